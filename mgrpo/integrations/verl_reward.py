"""Accuracy for verl's metrics and validation. Training does not use it: the vote overwrites the reward."""

from __future__ import annotations

import functools
from typing import Any

from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.extract import make_extractor
from mgrpo.integrations.shared import make_truth_reader


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any = None,
    extra_info: Any = None,
    *,
    extract: str = "boxed",
    label_extract: str = "auto",
    equivalence: str = "math",
    timeout_s: float = 5.0,
    **_: Any,
) -> dict[str, float]:
    """1 if the answer in a response equals the true one, else 0, under verl's names `score` and `acc`.

    Args:
        data_source: not read; every data set is graded alike.
        solution_str: the response.
        ground_truth: the true answer; None, as in data without labels, gives 0.
        extra_info: not read.
        extract, label_extract, equivalence, timeout_s: as `answer.extract`, `answer.label_extract`,
            `answer.equivalence` and `answer.timeout_s`.
    """
    truth = make_truth_reader(label_extract)(ground_truth)
    if truth is None:
        return {"score": 0.0, "acc": 0.0}
    find, checker = _make_grader(extract, equivalence, timeout_s)
    correct = float(checker.is_correct(find(solution_str), truth))
    return {"score": correct, "acc": correct}


@functools.lru_cache
def _make_grader(extract: str, equivalence: str, timeout_s: float) -> tuple[Any, AnswerChecker]:
    """Extractor and checker of this process; the checker's worker ends with the process."""
    return make_extractor(extract), AnswerChecker(mode=equivalence, timeout_s=timeout_s, num_workers=1)
