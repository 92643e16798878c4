"""Progress of a long grouping, and its stop after a failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SHOWN_AFTER_S = 5.0
SHOWN_EVERY_S = 1.0


class StoppedError(Exception):
    """Another thread of the same grouping failed."""


class Watch:
    """Progress of one call of `group_classes`; its threads call `tick` before each piece of work.

    Args:
        total: prompts to group.
        show: called with the prompts that are done and `total`, from any thread, one call at a time: after 5 s, then
            about every second, and at the end if it was called before. None shows nothing.
    """

    def __init__(self, total: int, show: Callable[[int, int], None] | None):
        self._total, self._show = total, show
        self._done, self._shown, self._stopped = 0, False, False
        self._next_s = time.monotonic() + SHOWN_AFTER_S
        self._lock = threading.Lock()

    def tick(self) -> None:
        """Shows the progress where it is due; raises StoppedError after `stop`."""
        if self._stopped:
            raise StoppedError
        if self._show is None or time.monotonic() < self._next_s:
            return
        with self._lock:
            if time.monotonic() >= self._next_s:
                self._report()

    def finish_one(self) -> None:
        """Counts a finished prompt; shows the last."""
        with self._lock:
            self._done += 1
            if self._show is not None and self._shown and self._done == self._total:
                self._report()

    def stop(self) -> None:
        """Ends every thread at its next tick."""
        self._stopped = True

    def _report(self) -> None:
        """Calls `show` and sets the time of the next call."""
        assert self._show is not None
        self._show(self._done, self._total)
        self._shown, self._next_s = True, time.monotonic() + SHOWN_EVERY_S
