"""Time to group the answers of one prompt when nearly all of them differ."""

from __future__ import annotations

import random

import pytest

from mgrpo.grading.checker import AnswerChecker

FORMS = (
    r"\frac{%d\sqrt{%d}+%d}{%d}",
    r"%d\pi+%d-\frac{%d}{%d}",
    "x^{%d}+%dx-%d+%dy",
    r"(%d,\frac{%d}{%d},%d)",
    r"(%d,1%d)\cup(2%d,3%d)",
    r"\{%d,%d,%d,%d\}",
    r"\frac{%dx+%d}{%dx-%d}",
    "%dx+%dy=%d%d",
)


@pytest.mark.parametrize("number", [64, 256])
def test_grouping(benchmark, number):
    """One running worker; fingerprints are computed again in every round."""
    rng = random.Random(0)
    rounds = [[FORMS[i % len(FORMS)] % tuple(rng.sample(range(11, 99), 4)) for i in range(number)] for _ in range(3)]
    with AnswerChecker(num_workers=1) as checker:
        checker.equivalent("x", "y^2")
        classes = []
        benchmark.pedantic(lambda: classes.append(checker.classes(rounds[len(classes)])), rounds=len(rounds))
    assert [len(set(ids)) for ids in classes] == [number] * len(rounds)
