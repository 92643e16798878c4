"""Comparison of candidates: interleaved times, and the error of their results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

Outputs = Mapping[str, Tensor]

# Results are compared in parts of this many elements, because their fp32 copies would fill a GPU.
_PART = 2**26


def interleave(candidates: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, float]:
    """Calls every candidate once to warm up, then `rounds` times in turn; returns median seconds by name.

    In turn, because other load on the machine then affects all of them.
    """
    for candidate in candidates.values():
        candidate()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def relative_error(actual: Outputs, expected: Outputs) -> float:
    """Largest relative Euclidean error of the outputs that both have; integers must be equal."""
    worst = 0.0
    shared = actual.keys() & expected.keys()
    assert shared, f"no output in common: {sorted(actual)}, {sorted(expected)}"
    for name in shared:
        one, other = actual[name], expected[name]
        assert one.shape == other.shape, f"{name}: shape {list(one.shape)}, expected {list(other.shape)}"
        if not other.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(one.to(other.dtype), other) else torch.inf)
            continue
        difference, size = _distance(one, other)
        error = difference / size if size else difference
        worst = max(worst, torch.inf if error != error else error)
    return worst


def _distance(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Euclidean norms of the difference and of `other`."""
    dtype = torch.float64 if other.dtype == torch.float64 else torch.float32
    squares = torch.zeros(2, dtype=torch.float64, device=other.device)
    for a, b in zip(one.reshape(-1).split(_PART), other.reshape(-1).split(_PART), strict=True):
        parts = (a.to(dtype) - b.to(dtype), b.to(dtype))
        squares += torch.stack([torch.linalg.vector_norm(part).double() for part in parts]).square()
    difference, size = squares.sqrt().tolist()
    return difference, size
