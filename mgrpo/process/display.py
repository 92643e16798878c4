"""The console on which tables and progress are shown."""

from __future__ import annotations

from rich.console import Console

WIDE = 100_000


def make_console(*, stderr: bool = False) -> Console:
    """A console that wraps lines only in a terminal: a file or a pipe has no width, and paths in it stay whole."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=WIDE, soft_wrap=True)
