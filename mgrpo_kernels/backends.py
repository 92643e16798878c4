"""Which implementation runs an operation: one fixed order per device, and never a silent fallback."""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

import torch

from mgrpo_kernels import _native


class Availability(NamedTuple):
    """Whether a backend can run here, and why."""

    available: bool
    reason: str


class _Support(NamedTuple):
    """What a backend takes; None for anything."""

    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...] | None


_KNOWN = {
    "reference": Availability(True, "plain PyTorch, runs on every device"),
    "cpu": Availability(_native.AVAILABLE, _native.REASON),
}
_SUPPORT = {"reference": _Support(None, None), "cpu": _Support(("cpu", "meta"), _native.DTYPES)}
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("reference",)}
_ANY_DEVICE = ("reference",)
_logger = logging.getLogger("mgrpo_kernels")
_announced: set[tuple[str, str, str]] = set()


def backends() -> dict[str, Availability]:
    """Every backend of this build, with its availability and the reason for it."""
    return dict(_KNOWN)


def resolve(op: str, device: torch.device, backend: str, dtypes: tuple[torch.dtype, ...] = ()) -> str:
    """Name of the backend that runs `op` on `device` for inputs of `dtypes`; MGRPO_BACKEND replaces "auto"."""
    source = "backend"
    if backend == "auto":
        source, backend = "MGRPO_BACKEND", os.environ.get("MGRPO_BACKEND", "auto")
    if backend == "auto":
        order = _ORDER.get(device.type, _ANY_DEVICE)
        backend = next(name for name in order if _KNOWN[name].available and _takes(name, dtypes))
    else:
        _check_choice(op, device, source, backend, dtypes)
    _announce(op, device.type, backend)
    return backend


def _takes(name: str, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether a backend takes inputs of these dtypes."""
    supported = _SUPPORT[name].dtypes
    return supported is None or all(dtype in supported for dtype in dtypes)


def _check_choice(op: str, device: torch.device, source: str, backend: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse a named backend that cannot run this call."""
    found = _KNOWN.get(backend)
    if found is None or not found.available:
        raise ValueError(_refusal(op, source, backend))
    devices = _SUPPORT[backend].devices
    if devices is not None and device.type not in devices:
        expected = f"a backend for {device.type} tensors"
        raise ValueError(f'{op}: {source} must be {expected}, got {backend!r}. Move the tensors or pass "auto".')
    if not _takes(backend, dtypes):
        names = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})
        expected = f"a backend for {' and '.join(names)}"
        raise ValueError(f'{op}: {source} must be {expected}, got {backend!r}. Convert the tensors or pass "auto".')


def _refusal(op: str, source: str, backend: str) -> str:
    """The error that lists what is available and why the rest is not."""
    names = [name for name, state in _KNOWN.items() if state.available]
    reasons = [f"{name} is unavailable: {state.reason}" for name, state in _KNOWN.items() if not state.available]
    if backend not in _KNOWN:
        reasons.append(f"{backend!r} is not a backend of this build")
    return f"{op}: {source} must be one of {['auto', *names]}, got {backend!r}. {'; '.join(reasons)}."


def _announce(op: str, device: str, backend: str) -> None:
    """One log line for each operation, device and backend."""
    if torch.compiler.is_compiling() or (op, device, backend) in _announced:
        return
    _announced.add((op, device, backend))
    _logger.info("%s on %s: backend %s (%s)", op, device, backend, _KNOWN[backend].reason)
