"""Handles signals that ask a run to end, so that a closed terminal or the end of a job loses no step."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from mgrpo.errors import Exit, Interrupted

# A user or scheduler asks the process to end; a second one ends it at once.
REQUESTS = (signal.SIGINT, signal.SIGTERM)
# A closed terminal and warnings of schedulers; they may arrive several times.
WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
# A second SIGTERM within this time counts as the first: timeout(1) signals the process and its group.
REPEAT_S = 1.0


class Interrupt:
    """Ends the run after its step on SIGINT, SIGTERM or a warning, and at once on a second SIGINT or SIGTERM.

    Before `defer` a signal raises Interrupted, because there is nothing to save before the first step.
    """

    def __init__(self) -> None:
        self.asked = False
        self._deferred = False
        self._finished = False
        self._first: tuple[int, float] | None = None  # the first, and its time

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Installs the handlers for the block if this is the main thread, as Python requires."""
        before = {}
        with suppress(ValueError):
            for number in (*REQUESTS, *active_warnings()):
                before[number] = signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                after = signal.SIG_IGN if self._finished else handler
                signal.signal(number, signal.SIG_DFL if after is None else after)

    def defer(self) -> None:
        """Makes later signals wait for the end of a step."""
        self._deferred = True
        if self.asked:  # its Interrupted was swallowed by a destructor
            raise Interrupted

    def finish(self) -> None:
        """Ignores later signals, also after the block: everything is saved, and the process ends with its own code."""
        self._finished = True

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._finished:
            return
        if number in REQUESTS:
            now = time.monotonic()
            if self._first and not (number == self._first[0] == signal.SIGTERM and now - self._first[1] < REPEAT_S):
                os._exit(Exit.KILLED)
            self._first = self._first or (number, now)
        is_first, self.asked = not self.asked, True
        if is_first and not self._deferred:
            raise Interrupted


def active_warnings() -> list[int]:
    """Warnings that are not ignored; nohup makes its command ignore hang-ups."""
    return [number for number in WARNINGS if signal.getsignal(number) != signal.SIG_IGN]


def end_early() -> None:
    """Makes signals end the process at once, with exit code 75, before training is set up."""
    for number in (*REQUESTS, *active_warnings()):
        signal.signal(number, lambda *_: os._exit(Exit.INTERRUPTED))


def end_with_parent() -> None:
    """Asks Linux to send this process SIGTERM once its parent is gone, even by kill -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def ignore_warnings() -> None:
    """Ignores SIGTERM and warnings, so that a process that is done ends with its own exit code."""
    for number in (signal.SIGTERM, *WARNINGS):
        signal.signal(number, signal.SIG_IGN)
