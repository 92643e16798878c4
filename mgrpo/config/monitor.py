"""Options of the collapse monitor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mgrpo.config.option import option


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Collapse monitor. It reads no label except through the probe."""

    on_collapse: Literal["warn", "stop", "rollback"] = "warn"
    """What an alarm does; `rollback` goes back to the last good checkpoint and on with other prompts."""
    max_rollbacks: int = option(2, least=0)
    """Rollbacks of a run; the alarm after that many stops it."""
    window: int = option(10, least=1)
    """Steps averaged before a signal is judged."""
    top_answer_share: float = option(0.3, above=0, most=1)
    """Alarm when this share of different prompts gets one and the same answer, and twice what it was at the start."""
    agreement_drop: float = option(0.3, above=0, most=1)
    """Alarm when policy and momentum elect the same answer for a share of prompts this far below its best, and farther
    than chance explains."""
    unparseable_share: float = option(0.5, above=0, most=1)
    """Alarm when this share of rollouts has no answer, and twice what it was at the start."""
    retention_drop: float = option(0.12, above=0, most=1)
    """Alarm when this share of the answers that the model was sure of at the start has changed; twice this share where
    momentum rollouts vote, for such a run may stray and come back."""
    retention_prompts: int = option(160, least=1)
    """Training prompts asked for such answers, in the first steps."""
    retention_every: int = option(20, least=0)
    """Steps between greedy repetitions of these prompts, a quarter as many once answers slip; 0 never asks."""
    length_change: float = option(2.0, above=1)
    """Alarm when responses are this many times longer or shorter than at the start."""
    probe_drop: float = option(0.1, above=0, most=1)
    """Alarm when probe accuracy is this far below its best."""

    def most_changed(self, *, anchored: bool) -> float:
        """Share of sure answers that may change, in a run with momentum rollouts (`anchored`) or without."""
        return min(self.retention_drop * (2 if anchored else 1), 1.0)
