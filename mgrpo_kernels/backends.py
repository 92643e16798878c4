"""Which implementation runs an operation: one fixed order per device, and never a silent fallback."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch


class Availability(NamedTuple):
    """Whether a backend can run here, and why."""

    available: bool
    reason: str


_KNOWN = {"reference": Availability(True, "plain PyTorch, runs on every device")}
_ORDER = {"cpu": ("reference",), "cuda": ("reference",)}
_ANY_DEVICE = ("reference",)


def backends() -> dict[str, Availability]:
    """Every backend of this build, with its availability and the reason for it."""
    return dict(_KNOWN)


def resolve(op: str, device: torch.device, backend: str) -> str:
    """Name of the backend that runs `op` on `device`; MGRPO_BACKEND replaces "auto"."""
    source = "backend"
    if backend == "auto":
        requested = os.environ.get("MGRPO_BACKEND", "auto")
        if requested == "auto":
            order = _ORDER.get(device.type, _ANY_DEVICE)
            return next(name for name in order if _KNOWN[name].available)
        source, backend = "MGRPO_BACKEND", requested
    found = _KNOWN.get(backend)
    if found is None or not found.available:
        raise ValueError(_refusal(op, source, backend))
    return backend


def _refusal(op: str, source: str, backend: str) -> str:
    """The error that lists what is available and why the rest is not."""
    names = [name for name, state in _KNOWN.items() if state.available]
    reasons = [f"{name} is unavailable: {state.reason}" for name, state in _KNOWN.items() if not state.available]
    if backend not in _KNOWN:
        reasons.append(f"{backend!r} is not a backend of this build")
    return f"{op}: {source} must be one of {['auto', *names]}, got {backend!r}. {'; '.join(reasons)}."
