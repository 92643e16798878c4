"""`make nightly`, with suites that do nothing."""

from __future__ import annotations

import pytest

from bench.nightly import SUITES, Result, main, make_page, summary_of

PRINTED = """
SKIPPED [1] tests/a.py:3: needs a GPU
=========== 3 passed, 1 skipped, 20 deselected in 12.30s ===========
1 failed, 2 passed in 0.50s
"""


def test_counts_of_every_run_of_pytest_are_kept():
    assert summary_of(PRINTED) == "3 passed, 1 skipped, 20 deselected; 1 failed, 2 passed"
    assert summary_of("make: *** Error 1") == "no test ran"


def test_the_page_names_commit_and_failures():
    results = [Result("one", "make a", True, "3 passed", 61.0), Result("two", "make b", False, "no test ran", 200.0)]
    lines = make_page(results, "abc", "2026-01-02").splitlines()
    assert lines[2] == "`make nightly` on commit abc, 2026-01-02."
    assert lines[-2:] == ["| one | `make a` | passed | 3 passed | 1 |", "| two | `make b` | FAILED | no test ran | 3 |"]


def test_the_page_is_written_after_each_suite(tmp_path):
    page, seen = tmp_path / "page.md", []

    def run(name, target, arguments):
        seen.append(page.read_text().count("passed |") if page.exists() else 0)
        return Result(name, target, name != "kernels under sanitizers", "", 0.0)

    assert main(["--page", str(page)], run) == 1
    assert seen == list(range(len(SUITES))) and page.read_text().count("FAILED") == 1
    assert main(["--page", str(page), "long tests"], run) == 0


def test_an_unknown_suite_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "SUITE must be one of long tests" in capsys.readouterr().err
