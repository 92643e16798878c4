"""Measurements on a GPU, as measure.py on a CPU: device clock, cold cache, roofs, peak memory and graph replays."""

from __future__ import annotations

import gc
import platform
import re
import subprocess
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.harness.measure import Memory

FLOP_UNIT = ("TFLOP/s", 1e12)
ALWAYS_COLD = True
WARMS_UP = True
PROTOCOL = (
    "Every candidate first solves a small problem: ours must stay within the error budget of mgrpo_kernels.testing, "
    "a peer's relative error (Euclidean, worst output, against fp64) must be under 0.05. Then each is called twice at "
    "the full shape, where its memory is read and its results are compared with ours, and all take turns for the "
    "same number of rounds, a call at a time. Clock: CUDA events on the stream. Ahead of every call a buffer of "
    "1 GiB, at least twice the L2, is written: the cache is cold, and the host is some 0.3 ms ahead of the device, so "
    "that launches hide behind it; a candidate that synchronises does not hide. ms: median (least). A ratio is the "
    "median over the rounds of peer / ours in the same round, beside it least / least. Roofs are the best of "
    "measurements before and after the case: copy_ of 1 GiB, read and written, or torch.mm of random 8192 x 8192 bf16 "
    "matrices. peak: the caching allocator's memory over what was allocated before the call, results included; "
    "temporary: the part of it given back by its end. host ms: the host's time to issue a call, median of 9, the "
    "device idle. A graph replay is a twentieth of the time of a CUDA graph that holds 20 calls, ahead of which the "
    "cache is cold."
)
_DEVICE = "cuda"
_SWEPT = 2**30
_COPIED = 2**30
_MM_SIDE = 8192
_GRAPH_CALLS = 20
_QUERIES = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")


def seconds(call: Callable[[], Any]) -> float:
    """Device time between two events around a call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_seconds(call: Callable[[], Any]) -> float:
    """Host time to issue a call to an idle device, median of 9; a synchronising call includes the wait."""
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return median(times)


def replay_seconds(call: Callable[[], Any], replays: int = 9) -> list[float]:
    """Time of one call in a CUDA graph of 20, for each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(_GRAPH_CALLS):
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        evict()
        times.append(seconds(graph.replay) / _GRAPH_CALLS)
    return times


@cache
def _sweep() -> Tensor:
    size = max(_SWEPT, 2 * torch.cuda.get_device_properties(0).L2_cache_size)
    return torch.empty(size // 4, device=_DEVICE)


def evict() -> None:
    """Writes a buffer of at least twice the L2, which also gives the host a lead over the device."""
    _sweep().fill_(1.0)


def _fastest(call: Callable[[], Any], calls: int) -> float:
    call()
    return min(seconds(call) for _ in range(calls))


@cache
def _copy_pair() -> tuple[Tensor, Tensor]:
    return torch.ones(_COPIED // 4, device=_DEVICE), torch.zeros(_COPIED // 4, device=_DEVICE)


def copy_gb_per_s() -> float:
    """GB/s read and written by copy_ of 1 GiB, the best of 10."""
    source, target = _copy_pair()
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), 10) / 1e9


@cache
def _mm_operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    operand = torch.randn(_MM_SIDE, _MM_SIDE, device=_DEVICE).to(dtype)
    return operand, torch.empty_like(operand)


def mm_flop_per_s(dtype: torch.dtype) -> float:
    """FLOP/s of torch.mm on random square matrices, the best of 10."""
    operand, out = _mm_operands(dtype)
    return 2 * _MM_SIDE**3 / _fastest(lambda: torch.mm(operand, operand, out=out), 10)


def with_memory(call: Callable[[], Any]) -> tuple[Any, Memory]:
    """Result and memory of a call, from the caching allocator."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return result, Memory(peak - before, peak - max(torch.cuda.memory_allocated(), before))


def free() -> None:
    """Frees unused memory."""
    gc.collect()
    torch.cuda.empty_cache()


def slug(name: str | None = None) -> str:
    """Folder of a device's records, such as nvidia_h200."""
    name = torch.cuda.get_device_name(0) if name is None else name
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _smi() -> dict[str, str]:
    """Fields of nvidia-smi for the first GPU; empty if it is missing or fails."""
    command = ("nvidia-smi", "--id=0", f"--query-gpu={','.join(_QUERIES)}", "--format=csv,noheader")
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in said.stdout.strip().split(",")]
    return dict(zip(_QUERIES, values, strict=True)) if len(values) == len(_QUERIES) and not said.returncode else {}


def describe() -> dict[str, Any]:
    """The GPU and its software versions."""
    found = torch.cuda.get_device_properties(0)
    smi = _smi()
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "model": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": found.total_memory // 2**30,
        "l2_mib": found.L2_cache_size // 2**20,
        "driver": smi.get("driver_version"),
        "clocks": {key.removeprefix("clocks."): smi[key] for key in _QUERIES if key.startswith("clocks.") and smi},
        "power_limit": smi.get("power.limit"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton,
    }
