"""Options, the `bench` fixture and the tables of `pytest bench/`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness.case import Case, Result, device_backends, meter, run_case
from bench.records import RECORDS, table, write

_results = pytest.StashKey[list[Result]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    group.addoption("--shapes", choices=("cpu", "cuda", "tiny"), help="default: the device's; tiny is for a trial")
    group.addoption("--record", action="store_true", help="write bench/records/DEVICE/OP.json for every op that ran")
    group.addoption("--record-dir", type=Path, help="folder for --record, written after every case")
    group.addoption("--backend", action="append", help="backends to time, in place of every native one")
    group.addoption("--slow-peers", action="store_true", help="also time peers that take a minute a call")
    group.addoption("--bench-seconds", type=float, default=6.0, help="time for the rounds of a case, 2 or 3 at least")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Timings are taken in the written order with fixed seeds, whatever pytest-randomly does to tests.
    for name in ("randomly_reset_seed", "randomly_reorganize"):
        if hasattr(config.option, name):
            setattr(config.option, name, False)
    config.stash[_results] = []
    config.addinivalue_line("markers", "cpu_shapes: a case of the shapes for a CPU alone")


def _device(config: pytest.Config) -> str:
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


def _scale(config: pytest.Config) -> str:
    return config.getoption("--shapes") or _device(config)


def _backends(config: pytest.Config, op: str) -> list[str]:
    return config.getoption("--backend") or device_backends(op, _device(config))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bench" in metafunc.fixturenames:
        assert metafunc.module is not None
        backends = _backends(metafunc.config, metafunc.module.OP)
        # On a GPU the other backends are timed in the case of the first: peers are slow to compile and large.
        metafunc.parametrize("backend", backends[:1] if _device(metafunc.config) == "cuda" else backends)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _scale(config) == "cpu":
        return
    left = [item for item in items if item.get_closest_marker("cpu_shapes")]
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> str:
    """Name of the shapes: "cpu", "cuda" or "tiny"."""
    return _scale(request.config)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return _device(request.config)


@pytest.fixture
def bench(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Case, str], None]:
    """Runs a case on a backend and keeps its table for the end."""
    config = request.config
    results, device = config.stash[_results], _device(config)

    def run(case: Case, backend: str) -> None:
        seconds = float(config.getoption("--bench-seconds") or 0)
        if _scale(config) == "tiny":
            # A trial skips peers that compile or import slowly, and takes at most three rounds.
            peers = [peer for peer in case.peers if peer.checked and peer.package is None]
            case, seconds = replace(case, peers=peers, cold=False), 0.0
        others = [name for name in _backends(config, case.op) if name != backend] if device == "cuda" else ["reference"]
        beside = others if backend != "reference" else []
        try:
            results.append(run_case(case, backend, benchmark, budget_seconds=seconds, device=device, beside=beside))
        finally:
            meter(device).free()
        folder = config.getoption("--record-dir")
        if config.getoption("--record") and isinstance(folder, Path):
            write([result for result in results if result.op == case.op], device, folder)

    return run


@pytest.fixture
def slow_peers(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--slow-peers"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[_results]
    if not results:
        return
    terminalreporter.section("kernels against their peers")
    for result in results:
        terminalreporter.write_line(table(result))
    if config.getoption("--record"):
        for path in write(results, _device(config), config.getoption("--record-dir") or RECORDS):
            terminalreporter.write_line(f"recorded {path}")
