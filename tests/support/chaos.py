"""The fault table: one line for each test that is marked with the fault it injects."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


class FaultTable:
    """Collects what became of every test marked `fault` and prints it at the end of the run."""

    def __init__(self) -> None:
        self.lines: dict[str, tuple[bool, int, float]] = {}  # fault: whether all passed, tests, seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report = yield
        marker = item.get_closest_marker("fault")
        if marker and (report.when == "call" or not report.passed):
            passed, tests, seconds = self.lines.get(marker.args[0], (True, 0, 0.0))
            self.lines[marker.args[0]] = (passed and report.passed, tests + 1, seconds + report.duration)
        return report

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.lines:
            return
        terminalreporter.section("faults injected")
        for fault, (passed, tests, seconds) in self.lines.items():
            verdict = "survived" if passed else "LOST"
            terminalreporter.write_line(f"{verdict:9} {seconds:6.1f} s  {tests:3} tests  {fault}")
