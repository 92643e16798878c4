"""Signals that ask a run to end: a terminal that dies, or a job whose time is over, loses no step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mgrpo.errors import Exit, Interrupted

# What a person sends who wants the process to end; sent again, it has to end at once.
WISHES = (signal.SIGINT, signal.SIGTERM)
# A terminal that goes away, and schedulers that warn; they may come in any number.
WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
# A SIGTERM so soon after another is the same: timeout(1) sends one to the process and one to its group.
SAME_WISH_S = 1.0


class Interrupt:
    """SIGINT, SIGTERM and warnings ask for an end after the step; a second SIGINT or SIGTERM ends at once.

    Until `defer` they raise Interrupted: before the first step there is nothing to save.
    """

    def __init__(self) -> None:
        self.asked = False
        self._deferred = False
        self._wish: tuple[int, float] | None = None  # the first, and when it came

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Installs the handlers for a while, where Python allows it (the main thread)."""
        before = {}
        try:
            for number in (*WISHES, *_heeded()):
                before[number] = signal.signal(number, self._ask)
        except ValueError:
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def defer(self) -> None:
        """From now on signals wait for the end of a step."""
        self._deferred = True
        if self.asked:  # and what it raised was lost in a destructor
            raise Interrupted

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number in WISHES:
            now = time.monotonic()
            if self._wish and not (number == self._wish[0] == signal.SIGTERM and now - self._wish[1] < SAME_WISH_S):
                os._exit(Exit.KILLED)
            self._wish = self._wish or (number, now)
        is_first, self.asked = not self.asked, True
        if is_first and not self._deferred:
            raise Interrupted


def _heeded() -> list[int]:
    """Warnings that are not ignored: nohup starts its command with hang-ups ignored, so that it goes on."""
    return [number for number in WARNINGS if signal.getsignal(number) != signal.SIG_IGN]


def end_early() -> None:
    """Lets each of these signals end the process at once while nothing has begun, with an exit code that says so."""

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(Exit.INTERRUPTED)

    for number in (*WISHES, *_heeded()):
        signal.signal(number, leave)


def ignore_warnings() -> None:
    """Lets a process that has its exit code end with it, whatever a dying terminal or a scheduler still sends."""
    for number in (signal.SIGTERM, *WARNINGS):
        signal.signal(number, signal.SIG_IGN)
