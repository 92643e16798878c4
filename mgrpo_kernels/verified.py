"""Backends that have passed their tests on a GPU, from verified.json, which bench/verified.py writes from records.

A run is valid for the source that it tested: a change of any line but a comment makes its row stale, and
bench/verified.py and the tests refuse a stale row. A call reads only the table.
"""

from __future__ import annotations

import json
import logging
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

FILE = Path(__file__).with_name("verified.json")
_logger = logging.getLogger("mgrpo_kernels")


class Run(NamedTuple):
    """One operation that passed on one GPU."""

    op: str
    backend: str
    dtype: str  # "float32"; "int64" for majority_vote
    capability: str  # of the card, such as "9.0"
    sources: str  # hash of the implementation
    device: str
    torch: str
    triton: str


@cache
def runs() -> tuple[Run, ...]:
    """All passed runs, the fastest backend of an operation and dtype first."""
    return tuple(Run(**entry) for entry in json.loads(FILE.read_text())["runs"])


def triton_version() -> str:
    """Version of the installed Triton; "" if there is none."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def find(op: str, dtypes: tuple[torch.dtype, ...], capability: tuple[int, int]) -> list[Run]:
    """A run for each backend that is verified for all dtypes on GPUs of this major architecture, fastest first."""
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    by_backend: dict[str, list[Run]] = {}
    for run in runs():
        if run.op == op and run.capability.partition(".")[0] == str(capability[0]):
            by_backend.setdefault(run.backend, []).append(run)
    return [found[0] for found in by_backend.values() if names <= {run.dtype for run in found}]


def choose(op: str, index: int | None, dtypes: tuple[torch.dtype, ...], among: tuple[str, ...]) -> str:
    """The fastest verified backend of those in `among`, or "reference"; a line in the log says why, once."""
    capability = _capability(index)
    return _choose(op, capability, dtypes, among) if among and capability else "reference"


# The attribute that torch.compiler.assume_constant_result sets, because a compiler must not trace reading files. The
# decorator itself would import the compiler, which takes longer than the rest of this package.
choose._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _capability(index: int | None) -> tuple[int, int] | None:
    """Capability of a GPU; None if there is none, which tensors without data may still name."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


@cache
def _choose(op: str, capability: tuple[int, int], dtypes: tuple[torch.dtype, ...], among: tuple[str, ...]) -> str:
    """The choice, cached so that it is logged once."""
    here = f"{capability[0]}.{capability[1]}"
    for run in find(op, dtypes, capability):
        if run.backend not in among:
            continue
        measured, current = (run.capability, run.torch, run.triton), (here, torch.__version__, triton_version())
        if measured != current:
            _logger.info(
                "%s: %s passed its tests on a %s (capability %s, torch %s, Triton %s); here are %s, %s, %s",
                *(op, run.backend, run.device, *measured, *current),
            )
        return run.backend
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "any dtype"
    _logger.warning(
        "%s runs on plain PyTorch: no kernel of this source has passed its tests on a card of capability %s for %s. "
        "MGRPO_BACKEND=%s forces one; `make gpu` tests them.",
        *(op, here, names, "|".join(among)),
    )
    return "reference"
