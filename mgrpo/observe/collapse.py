"""Collapse monitor: compares a run with its own start and gives the reasons for an alarm."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mgrpo.config import MonitorConfig
from mgrpo.types import Metrics

# A drop of the agreement by fewer standard errors, between the best window and the current one, counts as chance.
AGREEMENT_ERRORS = 6.0


class Monitor:
    """Compares windows of steps; `observe` takes one row of metrics a step, in order."""

    def __init__(self, config: MonitorConfig, *, num_prompts: int):
        self.config = config
        # Two prompts may share an answer by chance, which is a large share of few prompts.
        self.top_answer_share = max(config.top_answer_share, 2 / num_prompts)
        self.window_prompts = config.window * num_prompts
        self.recent: list[Metrics] = []
        self.start: Metrics | None = None
        self.accuracy: float | None = None  # newest accuracy on the eval set
        self.best_accuracy: float | None = None
        self.best_agreement = 0.0  # of any window
        self.first_alarm: int | None = None

    def observe(self, row: Metrics) -> list[str]:
        """Takes the metrics of one step; returns the reasons for an alarm, none before the first window is full."""
        if (accuracy := row.get("probe_accuracy_policy")) is not None:
            self.accuracy, self.best_accuracy = accuracy, max(accuracy, self.best_accuracy or 0.0)
        self.recent = [*self.recent, row][-self.config.window :]
        if len(self.recent) < self.config.window:
            return []
        if self.start is None:
            self.start = _means(self.recent)
        reasons = self._reasons(_means(self.recent), self.start, row)
        if reasons and self.first_alarm is None:
            self.first_alarm = row["step"]
        return reasons

    def _reasons(self, now: Metrics, start: Metrics, row: Metrics) -> list[str]:
        """Compares the current window with the first one."""
        c, reasons = self.config, []
        if now["top_answer_share"] > max(self.top_answer_share, 2 * start["top_answer_share"]):
            reasons.append(
                f"{now['top_answer_share']:.0%} of the answers to different prompts are {row.get('top_answer')!r}"
            )
        if now["unparseable_share"] > max(c.unparseable_share, 2 * start["unparseable_share"]):
            reasons.append(f"{now['unparseable_share']:.0%} of the responses have no answer")
        length, length_before = now["response_length"], start["response_length"]
        if length > c.length_change * length_before or length * c.length_change < length_before:
            reasons.append(f"responses went from {length_before:.0f} to {length:.0f} tokens")
        agreement = now.get("vote_agreement", self.best_agreement)
        self.best_agreement = max(agreement, self.best_agreement)
        # The best of many windows is far above the mean where agreement is by chance, as with guessed answers.
        chance = AGREEMENT_ERRORS * math.sqrt(self.best_agreement * (1 - self.best_agreement) / self.window_prompts)
        if agreement < self.best_agreement - max(c.agreement_drop, chance):
            reasons.append(
                f"the majorities of policy and momentum agree on {agreement:.0%} of the prompts, "
                f"at their best on {self.best_agreement:.0%}"
            )
        limit = 1 - c.most_changed(anchored="vote_agreement" in start)
        if (retention := row.get("retention")) is not None and retention < limit:
            reasons.append(f"{1 - retention:.0%} of the model's confident answers at the start have changed")
        accuracy, best = self.accuracy, self.best_accuracy
        if accuracy is not None and best is not None and accuracy < best - c.probe_drop:
            reasons.append(f"eval accuracy fell to {accuracy:.2f} from {best:.2f}")
        return reasons

    def good_before(self) -> int:
        """The newest good step: two windows before the first alarm, or before the newest step without an alarm."""
        newest = self.recent[-1]["step"] if self.recent else 0
        margin = max(2 * self.config.window, self.config.retention_every)
        return max((newest if self.first_alarm is None else self.first_alarm) - margin, 0)


def _means(rows: Sequence[Metrics]) -> Metrics:
    """Mean of each number over the rows that have it."""
    keys = ("top_answer_share", "unparseable_share", "response_length", "vote_agreement")
    values = {key: [row[key] for row in rows if row.get(key) is not None] for key in keys}
    return {key: sum(numbers) / len(numbers) for key, numbers in values.items() if numbers}
