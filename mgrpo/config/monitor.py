"""Options of the collapse monitor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mgrpo.config.option import option


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Collapse monitor. It uses no label except those of the eval set."""

    on_collapse: Literal["warn", "stop", "rollback"] = "warn"
    """Action at an alarm; `rollback` returns to the last good checkpoint and continues with other prompts."""
    max_rollbacks: int = option(2, least=0)
    """Largest number of rollbacks of a run; the next alarm stops it."""
    window: int = option(10, least=1)
    """Steps over which a signal is averaged."""
    top_answer_share: float = option(0.3, above=0, most=1)
    """Alarm when this share of different prompts has the same answer, and twice the share at the start."""
    agreement_drop: float = option(0.3, above=0, most=1)
    """Alarm when the share of prompts on which policy and momentum elect the same answer is this far below its best,
    and farther than chance explains."""
    unparseable_share: float = option(0.5, above=0, most=1)
    """Alarm when this share of rollouts has no answer, and twice the share at the start."""
    retention_drop: float = option(0.12, above=0, most=1)
    """Alarm when this share of the answers with a clear majority at the start has changed; twice this share with
    momentum rollouts, because such runs can recover."""
    retention_prompts: int = option(160, least=1)
    """Training prompts of the first steps whose answers are tracked."""
    retention_every: int = option(20, least=0)
    """Steps between greedy responses to these prompts, a quarter as many once answers change; 0 is never."""
    length_change: float = option(2.0, above=1)
    """Alarm when responses are this many times longer or shorter than at the start."""
    probe_drop: float = option(0.1, above=0, most=1)
    """Alarm when accuracy on the eval set is this far below its best."""

    def most_changed(self, *, anchored: bool) -> float:
        """Share of tracked answers that may change, in a run with momentum rollouts (`anchored`) or without."""
        return min(self.retention_drop * (2 if anchored else 1), 1.0)
