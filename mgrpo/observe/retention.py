"""Retention: how many of the answers that the model was sure of at the start it still gives. No label is read.

Self-reward can lose a model's ability while reward, votes and entropy look better and better. What it can not hide is
that answers change which the model gave both greedily and by majority before any training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo.config import MonitorConfig
from mgrpo.grading.checker import AnswerChecker

MIN_SHARE = 0.6  # of the votes, for an answer to be remembered
MIN_ANSWERS = 32  # fewer say nothing


class Retention:
    """Collects answers in the first steps, and compares greedy answers with them from then on.

    Args:
        config: number of prompts that are asked, and how often they are asked again.
        num_prompts: B, prompts a step.
        anchored: whether momentum rollouts vote.

    Attributes:
        answers: the answers remembered, by index of the prompt.
        newest: what was measured last.
    """

    def __init__(self, config: MonitorConfig, *, num_prompts: int, anchored: bool):
        self.every = config.retention_every
        self.slipping_below = 1 - config.most_changed(anchored=anchored) / 2
        self.newest = 1.0
        self.last_collected = -(-config.retention_prompts // num_prompts) if self.every else 0
        self.answers: dict[int, str] = {}

    def asks(self, step: int, batch: Sequence[int]) -> list[int]:
        """Indices of the prompts that are to be answered greedily at this step: none at most steps.

        Args:
            step: number of the step, from 1.
            batch: indices of the step's own prompts.
        """
        if step <= self.last_collected:
            return list(batch)
        every = self.every if self.newest >= self.slipping_below else self.every // 4 or 1
        due = self.every and step % every == 0 and len(self.answers) >= MIN_ANSWERS
        return list(self.answers) if due else []

    def collect(
        self,
        batch: Sequence[int],
        greedy: Sequence[str | None],
        elected: Sequence[str | None],
        shares: Sequence[float],
        checker: AnswerChecker,
    ) -> None:
        """Remembers the answers that won most of the votes and are the greedy ones too; the first of a prompt stays.

        Args:
            batch: [B] indices of prompts.
            greedy: [B] greedy answers, None where there is none.
            elected: [B] answers that won the vote.
            shares: [B] shares of the votes.
            checker: compares answers.
        """
        for index, own, answer, share in zip(batch, greedy, elected, shares, strict=True):
            if answer is not None and share >= MIN_SHARE and checker.is_correct(own, answer):
                self.answers.setdefault(index, answer)

    def measure(self, greedy: Sequence[str | None], checker: AnswerChecker) -> float:
        """Share of the remembered answers that are given again; `greedy` answers the prompts of `asks`."""
        kept = [checker.is_correct(own, was) for own, was in zip(greedy, self.answers.values(), strict=True)]
        self.newest = sum(kept) / len(kept)
        return self.newest

    def state_dict(self) -> dict[str, Any]:
        """The answers, by index as text (JSON), and the newest share."""
        return {"answers": {str(index): answer for index, answer in self.answers.items()}, "newest": self.newest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.answers = {int(index): answer for index, answer in state["answers"].items()}
        self.newest = state["newest"]
