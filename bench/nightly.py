"""Runs what takes too long for every change and keeps the result in docs/NIGHTLY.md: `make nightly`.

The page is written after each suite, so that a night that is cut short leaves what it found.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "NIGHTLY.md"
SUITES = {
    "long tests": ("test", "-m long --full"),
    "long tests with vLLM": ("test-vllm", "-m long --full"),
    "property tests on new examples": ("fuzz", ""),
    "kernels under sanitizers": ("sanitize", ""),
}
SUMMARY = re.compile(r"^=* ?(\d+ (?:passed|failed|error).*?) in [\d.]+s", re.MULTILINE)


class Result(NamedTuple):
    """What became of a suite."""

    name: str
    command: str
    passed: bool
    summary: str
    seconds: float


def run_suite(name: str, target: str, arguments: str) -> Result:
    """Runs a target of make and shows what it prints."""
    command = ["make", target, *([f"ARGS={arguments}"] if arguments else [])]
    started, printed = time.monotonic(), []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            printed.append(line)
    shown = f"make {target}" + (f" ARGS='{arguments}'" if arguments else "")
    return Result(name, shown, process.returncode == 0, summary_of("".join(printed)), time.monotonic() - started)


def summary_of(printed: str) -> str:
    """The counts of pytest's last lines, those of several runs one after the other."""
    return "; ".join(SUMMARY.findall(printed)) or "no test ran"


def make_page(results: Sequence[Result], commit: str, day: str) -> str:
    """The page: a table of results, and the commit that was tested."""
    rows = [
        f"| {r.name} | `{r.command}` | {'passed' if r.passed else 'FAILED'} | {r.summary} | {r.seconds / 60:.0f} |"
        for r in results
    ]
    head = ["# Last night", "", f"`make nightly` on commit {commit}, {day}.", ""]
    table = ["| suite | command | | tests | minutes |", "|---|---|---|---|---|"]
    return "\n".join([*head, *table, *rows]) + "\n"


def main(arguments: Sequence[str] | None = None, run: Callable[[str, str, str], Result] = run_suite) -> int:
    """Runs the suites; 0 if all pass."""
    parser = argparse.ArgumentParser(prog="python -m bench.nightly", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all by default")
    parser.add_argument("--page", type=Path, default=PAGE, help="file to write")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.suites if name not in SUITES]:
        parser.error(f"SUITE must be one of {', '.join(SUITES)}, got {', '.join(unknown)}")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    results: list[Result] = []
    for name in options.suites or SUITES:
        results.append(run(name, *SUITES[name]))
        options.page.write_text(make_page(results, commit, datetime.date.today().isoformat()))
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
