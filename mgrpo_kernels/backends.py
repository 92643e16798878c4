"""Choice of the implementation that runs an operation: one fixed order per device, without silent fallback."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from mgrpo_kernels import verified
from mgrpo_kernels._common import native
from mgrpo_kernels._common.checks import invalid
from mgrpo_kernels._common.triton import interprets


class Availability(NamedTuple):
    """Whether a backend can run here, and why."""

    available: bool
    reason: str


class _Support(NamedTuple):
    """What a backend takes; None for anything."""

    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...] | None


_SUPPORT = {
    "reference": _Support(None, None),
    "cpu": _Support(("cpu", "meta"), native.DTYPES),
    "triton": _Support(("cuda", "meta"), native.DTYPES),
    "cuda": _Support(("cuda", "meta"), native.DTYPES),
}
# Backends that run an operation by its schema in ops.py.
_COMPILED = ("cpu", "cuda", "triton")
# Order on a CPU and other devices; on a GPU `verified` chooses.
_ORDER = {"cpu": ("cpu", "reference")}
_ANY_DEVICE = ("reference",)
_logger = logging.getLogger("mgrpo_kernels")
_announced: set[tuple[str, str, str]] = set()


# Availability without a look at the GPU, whose driver must not be touched by the import of the package.
_KNOWN = {
    "reference": Availability(True, "plain PyTorch, runs on every device"),
    "cpu": Availability(*native.CPU),
    "triton": Availability(find_spec("triton") is not None, "the package triton is not installed"),
    "cuda": Availability(*native.CUDA),
}
_GPU_ONLY = ("cuda", "triton")


def _state(name: str) -> Availability:
    """Whether a backend can run here, and why."""
    state = _KNOWN[name]
    if not state.available or name not in _GPU_ONLY:
        return state
    if name == "triton" and interprets():
        return Availability(True, "TRITON_INTERPRET=1: slow, for tests on a CPU")
    if not torch.cuda.is_available():
        return Availability(False, "no CUDA device is available")
    return Availability(True, "compiled")


def implementations(reference: Callable[..., Any], compiled: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Implementations by backend; `compiled` is for all but the reference, and takes the backend's name."""
    return {"reference": reference} | {name: partial(compiled, backend=name) for name in _COMPILED}


def backends() -> dict[str, Availability]:
    """Backends of this build, each with its availability and the reason."""
    return {name: _state(name) for name in _KNOWN}


def resolve(
    op: str,
    device: torch.device,
    backend: str,
    dtypes: tuple[torch.dtype, ...] = (),
    among: Iterable[str] = tuple(_SUPPORT),
) -> str:
    """Name of the backend that runs `op` on `device` for inputs of `dtypes`, one `among` those that have it.

    MGRPO_BACKEND replaces "auto".
    """
    if not isinstance(backend, str):
        raise invalid(op, "backend", "a name", type(backend).__name__, 'Pass "auto".')
    source = "backend"
    if backend == "auto":
        source, backend = "MGRPO_BACKEND", os.environ.get("MGRPO_BACKEND", "auto")
    if backend == "auto":
        order = _GPU_ONLY if device.type == "cuda" else _ORDER.get(device.type, _ANY_DEVICE)
        able = tuple(name for name in order if name in among and _state(name).available and _takes(name, dtypes))
        backend = verified.choose(op, device.index, dtypes, able) if device.type == "cuda" else able[0]
    else:
        _check_choice(op, device, source, backend, dtypes, tuple(among))
    _announce(op, device.type, backend)
    return backend


def _takes(name: str, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether a backend takes inputs of these dtypes."""
    supported = _SUPPORT[name].dtypes
    return supported is None or all(dtype in supported for dtype in dtypes)


def _check_choice(
    op: str, device: torch.device, source: str, backend: str, dtypes: tuple[torch.dtype, ...], among: tuple[str, ...]
) -> None:
    """Raise ValueError for a named backend that cannot run this call."""
    if backend not in _KNOWN or backend not in among or not _state(backend).available:
        raise ValueError(_refusal(op, source, backend, among))
    devices = _SUPPORT[backend].devices
    if devices is not None and device.type not in devices and not (backend == "triton" and interprets()):
        expected = f"a backend for {device.type} tensors"
        raise ValueError(f'{op}: {source} must be {expected}, got {backend!r}. Move the tensors or pass "auto".')
    if not _takes(backend, dtypes):
        names = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})
        expected = f"a backend for {' and '.join(names)}"
        raise ValueError(f'{op}: {source} must be {expected}, got {backend!r}. Convert the tensors or pass "auto".')


def _refusal(op: str, source: str, backend: str, among: tuple[str, ...]) -> str:
    """The error that lists the available backends and the reasons for the others."""
    states = backends()
    names = [name for name, state in states.items() if state.available and name in among]
    reasons = [f"{name} is unavailable: {state.reason}" for name, state in states.items() if not state.available]
    if backend not in states:
        reasons.append(f"{backend!r} is not a backend of this build")
    elif states[backend].available:
        reasons.append(f"{backend} has no kernel for this operation")
    return f"{op}: {source} must be one of {['auto', *names]}, got {backend!r}. {'; '.join(reasons)}."


def _announce(op: str, device: str, backend: str) -> None:
    """Log the choice once for each operation, device and backend."""
    if torch.compiler.is_compiling() or (op, device, backend) in _announced:
        return
    _announced.add((op, device, backend))
    _logger.info("%s on %s: backend %s (%s)", op, device, backend, _state(backend).reason)
