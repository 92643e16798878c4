"""How far a long grouping is, for a person who waits, and its end where it fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SHOWN_AFTER_S = 5.0
SHOWN_EVERY_S = 1.0


class StoppedError(Exception):
    """Another thread of the same grouping failed."""


class Watch:
    """Of one call of `group_classes`; its threads call `tick` before each piece of work.

    Args:
        total: prompts to group.
        show: takes the prompts that are done and `total`, from any thread, one call at a time: once 5 s have passed,
            then about every second, and at the end where it was called before. None for nobody.
    """

    def __init__(self, total: int, show: Callable[[int, int], None] | None):
        self._total, self._show = total, show
        self._done, self._shown, self._stopped = 0, False, False
        self._next_s = time.monotonic() + SHOWN_AFTER_S
        self._lock = threading.Lock()

    def tick(self) -> None:
        """Shows how far it is where that is due; raises StoppedError after `stop`."""
        if self._stopped:
            raise StoppedError
        if self._show is None or time.monotonic() < self._next_s:
            return
        with self._lock:
            if time.monotonic() >= self._next_s:
                self._tell()

    def finish_one(self) -> None:
        """Counts a prompt, and shows the last."""
        with self._lock:
            self._done += 1
            if self._show is not None and self._shown and self._done == self._total:
                self._tell()

    def stop(self) -> None:
        """Ends every thread at its next tick."""
        self._stopped = True

    def _tell(self) -> None:
        """Calls `show`."""
        assert self._show is not None
        self._show(self._done, self._total)
        self._shown, self._next_s = True, time.monotonic() + SHOWN_EVERY_S
