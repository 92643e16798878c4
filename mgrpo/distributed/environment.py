"""What a launcher says of this process in environment variables; needs no torch."""

from __future__ import annotations

import os


def number(name: str, default: int) -> int:
    """An environment variable as a number, or the default if it is unset or not a number."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def local_size() -> int:
    """Processes of the run on this machine, at least 1."""
    return max(1, number("LOCAL_WORLD_SIZE", 1))
