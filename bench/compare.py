"""Interleaved timing: candidates take turns in one run, so that what else the machine does hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any


def interleave(candidates: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, float]:
    """Calls every candidate once to warm up, then `rounds` times in turn; returns median seconds by name."""
    for candidate in candidates.values():
        candidate()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}
