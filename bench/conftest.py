"""Options, the `bench` fixture and the tables of `pytest bench/`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.harness import Case, Result, cpu_backends, run_case
from bench.records import table, write

_results = pytest.StashKey[list[Result]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels")
    group.addoption("--record", action="store_true", help="write bench/records/cpu/OP.json for every op that ran")
    group.addoption("--backend", action="append", help="backends to time, in place of every native one")
    group.addoption("--slow-peers", action="store_true", help="also time peers that take a minute a call")
    group.addoption("--bench-seconds", type=float, default=6.0, help="time for the rounds of a case, 2 or 3 at least")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_results] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bench" in metafunc.fixturenames:
        assert metafunc.module is not None
        metafunc.parametrize("backend", metafunc.config.getoption("--backend") or cpu_backends(metafunc.module.OP))


@pytest.fixture
def bench(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Case, str], None]:
    """Runs a case on a backend and keeps its table for the end."""

    def run(case: Case, backend: str) -> None:
        seconds = float(request.config.getoption("--bench-seconds") or 0)
        request.config.stash[_results].append(run_case(case, backend, benchmark, budget_seconds=seconds))

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
        for path in write(results):
            terminalreporter.write_line(f"recorded {path}")
