"""One benchmark case: ours and its peers checked on a small problem, then timed in turn on the same inputs."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from types import ModuleType
from typing import Any

import torch

from bench.harness import cuda, measure
from bench.harness.compare import Outputs, relative_error
from mgrpo_kernels import backends
from mgrpo_kernels.backends import resolve
from mgrpo_kernels.testing import assert_within_budget

_BACKEND_ORDER = ("cuda", "triton", "cpu", "reference")

# A slower candidate is not timed in rounds; below the second limit it is called a second time.
SLOW_SECONDS = 5.0
TWICE_SECONDS = 30.0
# Three rounds make a median; two do where a round takes this long.
LONG_ROUND_SECONDS = 10.0
MOST_ROUNDS = 60
# Half the error of the mutant "scaled_0.9" of mgrpo_kernels.testing: a peer with more computes something else.
SAME_QUANTITY = 0.05


class NotInstalledError(Exception):
    """A peer's package is missing."""


def load(module: str, attribute: str) -> Any:
    """An attribute of an installed module; NotInstalledError where its package is missing."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise NotInstalledError(module.partition(".")[0])
    return getattr(importlib.import_module(module), attribute)


def meter(device: str) -> ModuleType:
    """The clock, roofs and memory of a device."""
    return cuda if device == "cuda" else measure


def inputs_on(device: str) -> AbstractContextManager[Any]:
    """Sets the default device for making inputs; off while candidates run, because it slows every torch call."""
    return torch.device(device) if device != "cpu" else nullcontext()


def device_backends(op: str, device: str) -> list[str]:
    """Available backends for `op` on a device; the reference only if there is no other."""
    found = []
    for name, state in backends().items():
        if not state.available:
            continue
        try:
            resolve(op, torch.device(device), name)
        except ValueError:
            continue
        found.append(name)
    return sorted((name for name in found if name != "reference"), key=_BACKEND_ORDER.index) or found


@dataclass(frozen=True, kw_only=True)
class Run:
    """A candidate bound to one set of inputs."""

    call: Callable[[], Any]
    """The timed call."""
    outputs: Callable[[Any], Outputs]
    """Named results from what the call returned; not timed."""
    restore: Callable[[], Any] | None = None
    """Restores inputs that the call overwrote, after each call; not timed."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An implementation of the case's results, or of some of them."""

    name: str
    """As printed."""
    prepare: Callable[[Any], Run]
    """Binds the candidate to inputs; imports its package, and may raise."""
    package: str | None = None
    """Distribution whose version is recorded."""
    checked: bool = True
    """Whether it is checked on the small problem first; False if it would compile twice."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation in one mode, dtype and shape."""

    op: str
    mode: str
    """The call, such as "forward"."""
    dtype: str
    shape: str
    make: Callable[[], Any]
    """Makes the inputs for timing."""
    make_small: Callable[[], Any]
    """Makes the inputs of the check."""
    ours: Callable[[str], Candidate]
    """Our operation by backend."""
    oracle: Callable[[Any], Outputs]
    """All named results in fp64."""
    peers: Sequence[Candidate]
    reduction_length: int
    """Reduction length of the check's inputs, for the error budget."""
    bytes_moved: int | None = None
    """Least bytes that the operation moves, for GB/s."""
    flop: int | None = None
    """Least floating-point operations, for GFLOP/s; the dtype selects the roof."""
    cold: bool = False
    """Whether the cache is evicted before every call."""
    launch_bound: bool = False
    """Whether host time exceeds GPU time; host times and graph replays are then measured too."""
    derived: Callable[[Outputs], Outputs] | None = None
    """Derives results that only peers return from ours, for the comparison at the full shape."""


@dataclass(kw_only=True)
class Row:
    """One candidate's result, as recorded."""

    candidate: str
    backend: str | None = None
    package: str | None = None
    status: str = "ok"
    """ok | not installed | failed | differs"""
    detail: str = ""
    error: float | None = None
    """Largest relative error of an output."""
    error_against: str = "fp64"
    rounds: int = 0
    ms: float | None = None
    ms_min: float | None = None
    rate: float | None = None
    roof_share: float | None = None
    peak_mib: float | None = None
    temporary_mib: float | None = None
    ratio: float | None = None
    ratio_least: float | None = None
    host_ms: float | None = None


@dataclass(kw_only=True)
class Result:
    """Rows of one case."""

    op: str
    mode: str
    dtype: str
    shape: str
    backend: str
    cold: bool
    unit: str | None
    roof: float | None = None
    load: float | None = None
    """Load average of the last minute at the end of the case, this process included; None on a GPU."""
    rows: list[Row] = field(default_factory=list)


@dataclass
class _Timed:
    """A candidate that passed its checks, its call and its seconds."""

    row: Row
    run: Run
    meter: ModuleType
    seconds: list[float] = field(default_factory=list)

    @property
    def slow(self) -> bool:
        return min(self.seconds) > SLOW_SECONDS

    def clear(self, cold: bool) -> None:
        """Restores the inputs and the state of the cache before the next call."""
        if self.run.restore is not None:
            self.run.restore()
        if cold:
            self.meter.evict()
        else:
            self.run.call()

    def clock(self) -> None:
        self.seconds.append(self.meter.seconds(self.run.call))


def package_version(package: str) -> str | None:
    """Installed version of a distribution."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _check_ours(case: Case, candidate: Candidate, row: Row, inputs: Any, oracle: Outputs) -> None:
    """Checks ours against the error budget of the tests."""
    run = candidate.prepare(inputs)
    outputs = run.outputs(run.call())
    reference = case.ours("reference").prepare(inputs)
    expected = reference.outputs(reference.call())
    for name, value in outputs.items():
        if not value.is_floating_point():
            assert torch.equal(value, oracle[name]), f"{candidate.name}: {name} differs from the oracle"
            continue
        assert_within_budget(
            value,
            oracle[name],
            expected[name],
            reduction_length=case.reduction_length,
            what=f"{candidate.name}: {name}",
        )
    row.error = relative_error(outputs, oracle)


def _attempt(row: Row, used: ModuleType, step: Callable[[], Any]) -> Any:
    """Runs a step of a peer; its errors are reported in its row."""
    try:
        return step()
    except NotInstalledError as error:
        row.status, row.detail = "not installed", str(error)
    except Exception as error:
        lines = str(error).strip().splitlines()
        row.status, row.detail = "failed", f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
    # After the exception, whose frames hold allocated memory.
    used.free()
    return None


def _refuses(error: ValueError | KeyError, op: str, backend: str) -> bool:
    """Whether an error says that a backend lacks the operation, which is then timed on the reference."""
    return error.args == (backend,) if isinstance(error, KeyError) else f"{op}: backend must be" in str(error)


def _compare(row: Row, outputs: Outputs, expected: Outputs, against: str) -> float:
    """Relative error; a candidate with too large an error is marked "differs" and not timed."""
    error = relative_error(outputs, expected)
    if not error <= SAME_QUANTITY:
        row.status, row.detail = "differs", f"relative error {error:.2g} against {against}"
    return error


def _check_peer(candidate: Candidate, row: Row, used: ModuleType, inputs: Any, oracle: Outputs) -> None:
    def step() -> None:
        run = candidate.prepare(inputs)
        row.error = _compare(row, run.outputs(run.call()), oracle, "fp64")

    _attempt(row, used, step)


def _first_call(candidate: Candidate, row: Row, used: ModuleType, inputs: Any, cold: bool) -> tuple[_Timed, Outputs]:
    """Binds a candidate to the full inputs and calls it once, for its memory and a first time."""
    run = candidate.prepare(inputs)
    if used.WARMS_UP or not candidate.checked:
        run.call()
        if run.restore is not None:
            run.restore()
    if cold:
        used.evict()
    times: list[float] = []

    def timed() -> Any:
        results = []
        times.append(used.seconds(lambda: results.append(run.call())))
        return results[0]

    result, memory = used.with_memory(timed)
    if memory.peak is not None and memory.temporary is not None:
        row.peak_mib, row.temporary_mib = memory.peak / 2**20, memory.temporary / 2**20
    return _Timed(row, run, used, times), run.outputs(result)


def _first_calls(
    others: Sequence[Candidate], rows: Sequence[Row], used: ModuleType, inputs: Any, cold: bool, expected: Outputs
) -> list[_Timed]:
    """The other candidates whose results agree with ours at the full shape."""
    timed: list[_Timed] = []
    for other, row in zip(others, rows, strict=True):
        if row.status != "ok":
            continue

        def step(other: Candidate = other, row: Row = row) -> tuple[_Timed, float]:
            called, outputs = _first_call(other, row, used, inputs, cold)
            return called, _compare(row, outputs, expected, "ours")

        found = _attempt(row, used, step)
        if found is None:
            continue
        if not other.checked:
            row.error, row.error_against = found[1], "ours"
        if row.status == "ok":
            timed.append(found[0])
    return timed


def _roof(case: Case, used: ModuleType) -> float | None:
    """The roof of the case's rate, measured on a quiet machine."""
    used.evict()
    if case.flop is not None:
        return used.mm_flop_per_s(torch.bfloat16 if case.dtype == "bfloat16" else torch.float32) / used.FLOP_UNIT[1]
    return used.copy_gb_per_s() if case.bytes_moved is not None else None


def _take_turns(benchmark: Any, ours: _Timed, others: Sequence[_Timed], cold: bool, rounds: int) -> None:
    """Times ours in rounds, with the other candidates in each round's set-up, in rotating order."""
    turn = 0

    def others_first() -> None:
        nonlocal turn
        if not cold:
            ours.meter.evict()
        for index in range(len(others)):
            timed = others[(index + turn) % len(others)]
            timed.clear(cold)
            timed.clock()
        turn += 1
        ours.clear(cold)

    def call() -> None:
        ours.run.call()

    for timed in (ours, *others):
        timed.seconds.clear()
    has_own_clock = ours.meter is not measure
    benchmark.pedantic(ours.clock if has_own_clock else call, setup=others_first, rounds=rounds, iterations=1)
    if benchmark.stats is not None and not has_own_clock:
        ours.seconds.extend(benchmark.stats.stats.data)


def _replay(case: Case, own: _Timed, candidates: Iterable[_Timed]) -> list[_Timed]:
    """Host times of all candidates, and separate rows of ours in CUDA graphs."""
    replayed = []
    for timed in candidates:
        timed.row.host_ms = cuda.host_seconds(timed.run.call) * 1e3
        if timed is own or timed.row.candidate.startswith("ours, "):
            row = Row(candidate=f"{timed.row.candidate}, graph replay")
            times = _attempt(row, cuda, lambda timed=timed: cuda.replay_seconds(timed.run.call))
            replayed.append(_Timed(row, timed.run, cuda, times or []))
    return replayed


def _fill(case: Case, used: ModuleType, ours: _Timed, candidates: Iterable[_Timed], roof: float | None) -> None:
    """Fills in the times, rates and ratios of all rows."""
    work = case.flop if case.flop is not None else case.bytes_moved
    scale = used.FLOP_UNIT[1] if case.flop is not None else 1e9
    for timed in candidates:
        row, times = timed.row, timed.seconds
        if not times:
            continue
        row.rounds, row.ms, row.ms_min = len(times), median(times) * 1e3, min(times) * 1e3
        if work is not None and roof is not None:
            rate = work / median(times) / scale
            row.rate, row.roof_share = rate, rate / roof
        row.ratio_least = min(times) / min(ours.seconds) if ours.seconds else None
        if len(times) == len(ours.seconds):
            row.ratio = median(theirs / own for theirs, own in zip(times, ours.seconds, strict=True))
        elif ours.seconds:
            row.ratio = median(times) / median(ours.seconds)


def run_case(
    case: Case, backend: str, benchmark: Any, *, budget_seconds: float, device: str = "cpu", beside: Sequence[str] = ()
) -> Result:
    """Checks, times and compares one case; the backends in `beside` are timed like peers."""
    used = meter(device)
    cold = case.cold or used.ALWAYS_COLD
    ours = case.ours(backend)
    others = [case.ours(name) for name in beside] + list(case.peers)
    unit = used.FLOP_UNIT[0] if case.flop is not None else "GB/s" if case.bytes_moved is not None else None
    rows = [Row(candidate=ours.name, backend=backend)]
    rows += [Row(candidate=other.name, package=other.package) for other in others]
    result = Result(
        op=case.op,
        mode=case.mode,
        dtype=case.dtype,
        shape=case.shape,
        backend=backend,
        cold=cold,
        unit=unit,
        rows=rows,
    )

    with inputs_on(device):
        small = case.make_small()
    oracle = case.oracle(small)
    try:
        _check_ours(case, ours, rows[0], small, oracle)
    except (ValueError, KeyError) as error:
        if backend == "reference" or not _refuses(error, case.op, backend):
            raise
        next_backend, *rest = [*(name for name in beside if name != "reference"), "reference"]
        return run_case(case, next_backend, benchmark, budget_seconds=budget_seconds, device=device, beside=rest[:-1])
    for other, row in zip(others, rows[1:], strict=True):
        if other.checked:
            _check_peer(other, row, used, small, oracle)
    del small, oracle

    with inputs_on(device):
        inputs = case.make()
    main, expected = _first_call(ours, rows[0], used, inputs, cold)
    if case.derived is not None:
        expected = {**expected, **case.derived(expected)}
    timed = _first_calls(others, rows[1:], used, inputs, cold, expected)
    del expected

    for candidate in timed:
        if candidate.slow and candidate.seconds[0] < TWICE_SECONDS:
            candidate.clear(cold)
            candidate.clock()
    once = [candidate for candidate in timed if candidate.slow]
    turns = [candidate for candidate in timed if not candidate.slow]
    pass_seconds = sum(min(candidate.seconds) for candidate in (main, *turns)) * (1 if cold else 2)
    least = 2 if pass_seconds > LONG_ROUND_SECONDS else 3
    rounds = min(MOST_ROUNDS, max(least, int(budget_seconds / pass_seconds)))
    roof = _roof(case, used)
    _take_turns(benchmark, main, turns, cold, rounds)
    result.roof = None if roof is None else max(roof, _roof(case, used) or 0.0)
    if device == "cpu":
        result.load = os.getloadavg()[0]
    replayed = _replay(case, main, [main, *turns]) if case.launch_bound and device == "cuda" else []
    _fill(case, used, main, [main, *turns, *once, *replayed], result.roof)
    rows.extend(timed.row for timed in replayed)

    benchmark.group = f"{case.op}, {case.mode}, {case.dtype}, {case.shape}"
    benchmark.extra_info |= {f"{row.candidate}, x ours": row.ratio or row.status for row in rows[1:]}
    return result
