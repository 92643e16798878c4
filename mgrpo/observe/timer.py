"""Measures wall-clock seconds of a step by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mgrpo.types import Metrics


class Timer:
    """Sums wall-clock seconds by phase; `metrics()` returns `step_s` and those of `phases()`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins a step."""
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times a block as part of `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self) -> Metrics:
        """Seconds of the step and of each phase so far."""
        return {"step_s": time.perf_counter() - self._start} | self.phases()

    def phases(self) -> Metrics:
        """Seconds of each phase so far, by `time_<phase>_s`."""
        return {f"time_{phase}_s": seconds for phase, seconds in self.seconds.items()}
