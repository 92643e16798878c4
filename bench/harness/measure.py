"""Measurements on a CPU: clock, cold cache, roofs, peak memory, and the machine's description."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOP_UNIT = ("GFLOP/s", 1e9)
# A case states whether its cache is cold; a candidate that compiles for its first shapes is called once more.
ALWAYS_COLD = False
WARMS_UP = False
PROTOCOL = (
    "Every candidate first solves a small problem: ours must stay within the error budget of mgrpo_kernels.testing, "
    "a peer's relative error (Euclidean, worst output, against fp64) must be under 0.05. Then each is called once "
    "at the full shape, where its memory is read and its results are compared with ours, and all take turns for the "
    "same number of rounds, a call at a time; ours is clocked by pytest-benchmark. A candidate slower than 5 s is "
    "called once or twice instead. Cold cases read a buffer of twice the last-level cache (at most 1 GiB) ahead of "
    "every call, again while that read takes over 1.25 times its least (8 times at most), for then the machine is "
    "busy; warm cases do so ahead of every round, and call each candidate once more, unclocked, ahead of its "
    "clocked call. ms: median (least). A ratio is the median over the rounds of peer / ours in the same round, "
    "beside it least / least. "
    "Roofs are the best of measurements before and after the case: copy_ of 512 MiB, whose stores read their lines "
    "first, so that work in place can pass 100 %, or torch.mm of square matrices. peak: memory over what was "
    "resident before the call, results included; temporary: the part of it given back by its end. The allocator is "
    "that of the process: a candidate that allocates pays for fresh pages."
)
_MOST_SWEPT = 2**30
_COPIED = 2**28
_MOST_PROBES = 8
_QUIET = 1.25
# Sides of the square products: about 50 ms each where AMX multiplies bf16 and AVX-512 multiplies fp32.
_MM_SIDE = {torch.float32: 2048, torch.bfloat16: 4096}


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock time of one call, including the release of its result."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@cache
def cache_bytes() -> int:
    """Size of the last-level cache; 32 MiB if unknown."""
    try:
        said = subprocess.run(("getconf", "-a"), capture_output=True, text=True, check=False).stdout.split("\n")
    except OSError:
        said = []
    sizes = [int(line.split()[1]) for line in said if "CACHE_SIZE" in line and line.split()[1:2] not in ([], ["0"])]
    return max(sizes, default=2**25)


@cache
def _sweep() -> Tensor:
    return torch.ones(min(2 * cache_bytes(), _MOST_SWEPT) // 4)


_least_sweep = [float("inf")]


def evict() -> None:
    """Reads a buffer of twice the last-level cache (at most 1 GiB), so that the next call starts with a cold cache.

    While the read is slow, the machine is busy with something else, such as reclaiming the pages that the former
    candidate freed; the read is then repeated, at most 8 times.
    """
    buffer = _sweep()
    for _ in range(_MOST_PROBES):
        elapsed = seconds(buffer.sum)
        _least_sweep[0] = min(_least_sweep[0], elapsed)
        if elapsed <= _QUIET * _least_sweep[0]:
            return


@cache
def _copy_pair() -> tuple[Tensor, Tensor]:
    return torch.ones(_COPIED // 2), torch.zeros(_COPIED // 2)


def copy_gb_per_s() -> float:
    """GB/s read and written by copy_ of 512 MiB, the best of 3."""
    source, target = _copy_pair()
    fastest = min(seconds(lambda: target.copy_(source)) for _ in range(3))
    return 2 * source.nbytes / fastest / 1e9


@cache
def _mm_operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    side = _MM_SIDE[dtype]
    return torch.randn(side, side).to(dtype), torch.empty(side, side, dtype=dtype)


def mm_flop_per_s(dtype: torch.dtype) -> float:
    """FLOP/s of torch.mm on square matrices, the best of 3."""
    operand, out = _mm_operands(dtype)
    fastest = min(seconds(lambda: torch.mm(operand, operand, out=out)) for _ in range(3))
    return 2 * operand.shape[0] ** 3 / fastest


class Memory(NamedTuple):
    """Memory of one call, in bytes above the resident size before it; None if the system cannot tell."""

    peak: int | None
    """Peak, results included."""
    temporary: int | None
    """The part of the peak that was freed before the call returned."""


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def with_memory(call: Callable[[], Any]) -> tuple[Any, Memory]:
    """Result and memory of a call, by the kernel's high-water mark, which is reset first."""
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
        trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return call(), Memory(None, None)
    before = _resident("VmRSS:")
    result = call()
    peak = _resident("VmHWM:")
    trim(0)
    return result, Memory(max(peak - before, 0), max(peak - max(_resident("VmRSS:"), before), 0))


def free() -> None:
    """Does nothing: the allocator of the process keeps no cache to free."""


def slug() -> str:
    """Folder of a device's records."""
    return "cpu"


def describe() -> dict[str, Any]:
    """The machine's description, without its name and paths."""
    info = Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.exists() else {}
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
    return {
        "model": fields.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "isa": [flag for flag in known if flag in flags],
        "cache_mib": cache_bytes() // 2**20,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit() -> dict[str, Any]:
    """Commit of the checkout, and whether tracked files outside bench/records differ from it."""
    root = Path(__file__).parent

    def git(*args: str) -> str | None:
        done = subprocess.run(("git", "-C", str(root), *args), capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--", ":/", ":(exclude)bench/records", ":(exclude)bench/RECORDS.md")
    return {"commit": git("rev-parse", "HEAD"), "modified": None if changed is None else bool(changed)}
