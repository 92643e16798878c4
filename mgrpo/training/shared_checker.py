"""Comparison of answers in a run of several processes: rank 0 alone compares, and all ranks get its verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mgrpo.distributed.together import on_first
from mgrpo.distributed.world import World
from mgrpo.grading.checker import AnswerChecker

MAX_KNOWN = 100_000
"""Verdicts that are remembered; every rank remembers the same."""


class SharedChecker(AnswerChecker):
    """An AnswerChecker whose worker processes live on rank 0, so that a time limit has one outcome.

    Every rank must ask the same questions in the same order.
    """

    def __init__(self, world: World, **options: Any):
        super().__init__(**options)
        self.world = world
        self.known: dict[tuple[str, str], bool] = {}

    def equivalent(self, first: str, second: str) -> bool:
        """See AnswerChecker."""
        if first == second:
            return super().equivalent(first, second)
        pair = (first, second)
        if pair not in self.known:
            if len(self.known) >= MAX_KNOWN:
                self.known.clear()
            self.known[pair] = on_first(self.world, lambda: super(SharedChecker, self).equivalent(first, second))
        return self.known[pair]

    def group_classes(self, groups: Sequence[Sequence[str | None]]) -> list[list[int]]:
        """See AnswerChecker."""
        return on_first(self.world, lambda: super(SharedChecker, self).group_classes(groups))
