"""Verdicts on sets of answers that others have graded, where the sets are at hand, and on a small one of our own."""

from __future__ import annotations

import json
import time

import pytest

from bench.studies.graded_answers import SETS, find_data, grade, main
from mgrpo.grading.checker import AnswerChecker

# What the publishers got wrong: ten thousand written with a LaTeX comma.
PUBLISHED_WRONGLY = {"idx 72, sample 7"}
NUM_ANSWERS = {"gsm8k_graded_solutions": 5276, "qwen25_math_graded_samples": 800, "math500_test": 500}


@pytest.mark.parametrize("name", SETS)
def test_graded_answers_keep_their_verdicts(name):
    folder = find_data()
    if not (folder / f"{name}.jsonl").exists():
        pytest.skip(f"{name}.jsonl is not at hand: set MGRPO_DATA to its folder")
    answers = list(SETS[name](folder))
    start = time.process_time()
    with AnswerChecker(timeout_s=60.0) as checker:
        others = grade(answers, checker, 1)
        assert (checker.timeouts, checker.failures) == (0, 0)
    assert time.process_time() - start < 60
    assert len(answers) == NUM_ANSWERS[name]
    assert {each.place for each in others} <= PUBLISHED_WRONGLY


def test_a_verdict_that_differs_is_printed(tmp_path, monkeypatch, capsys):
    solutions = [
        {"model": "one", "text": "3 + 4 = 7\nA: 7 apples", "published_correct": True},
        {"model": "two", "text": "3 + 4 = 8\nA: 8", "published_correct": True},
        {"model": "cut", "text": "3 +", "published_correct": False},
    ]
    row = {"question": "3 + 4?", "ground_truth": "It is 7.\nA: 7", "solutions": solutions}
    (tmp_path / "gsm8k_graded_solutions.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr("sys.argv", ["graded_answers", str(tmp_path)])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "2 of 3" in printed and "question 0, two: '8' against '7' is published as True" in printed
    assert f"math500_test                 is not in {tmp_path}" in printed
