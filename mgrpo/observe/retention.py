"""Retention: the share of the model's confident answers at the start that it still gives. No label is read.

Self-reward can lose a model's ability while reward, votes and entropy improve. It cannot hide that answers change which
the model gave both greedily and by majority before training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo.config import MonitorConfig
from mgrpo.grading.checker import AnswerChecker

MIN_SHARE = 0.6  # of the votes for an answer that is remembered
MIN_ANSWERS = 32  # fewer are not measured


class Retention:
    """Remembers answers of the first steps and compares later greedy answers with them.

    Args:
        config: number of prompts, and the interval in steps.
        num_prompts: B, prompts a step.
        anchored: True if momentum rollouts vote.

    Attributes:
        answers: remembered answers by prompt index.
        newest: the share measured last.
    """

    def __init__(self, config: MonitorConfig, *, num_prompts: int, anchored: bool):
        self.every = config.retention_every
        self.often_below = 1 - config.most_changed(anchored=anchored) / 2
        self.newest = 1.0
        self.last_collected = -(-config.retention_prompts // num_prompts) if self.every else 0
        self.answers: dict[int, str] = {}

    def asks(self, step: int, batch: Sequence[int]) -> list[int]:
        """Indices of the prompts to answer greedily at this step; none at most steps.

        Args:
            step: number of the step, from 1.
            batch: indices of the step's own prompts.
        """
        if step <= self.last_collected:
            return list(batch)
        every = self.every if self.newest >= self.often_below else self.every // 4 or 1
        due = self.every and step % every == 0 and len(self.answers) >= MIN_ANSWERS
        return list(self.answers) if due else []

    def collect(
        self,
        batch: Sequence[int],
        greedy: Sequence[str | None],
        majority: Sequence[str | None],
        shares: Sequence[float],
        checker: AnswerChecker,
    ) -> None:
        """Remembers answers with at least 60 % of the votes that equal the greedy answer; the first of a prompt stays.

        Args:
            batch: [B] indices of prompts.
            greedy: [B] greedy answers, None without one.
            majority: [B] majority answers.
            shares: [B] their shares of the votes.
            checker: compares answers.
        """
        for index, own, answer, share in zip(batch, greedy, majority, shares, strict=True):
            if answer is not None and share >= MIN_SHARE and checker.is_correct(own, answer):
                self.answers.setdefault(index, answer)

    def measure(self, greedy: Mapping[int, str | None], checker: AnswerChecker) -> float | None:
        """The share of remembered answers that equal `greedy`, answers by prompt index; None if none is remembered."""
        kept = [checker.is_correct(own, self.answers[i]) for i, own in greedy.items() if i in self.answers]
        if not kept:
            return None
        self.newest = sum(kept) / len(kept)
        return self.newest

    def state_dict(self) -> dict[str, Any]:
        """The answers by prompt index, as text for JSON, and the newest share."""
        return {"answers": {str(index): answer for index, answer in self.answers.items()}, "newest": self.newest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.answers = {int(index): answer for index, answer in state["answers"].items()}
        self.newest = state["newest"]
