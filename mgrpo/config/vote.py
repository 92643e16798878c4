"""Options of the vote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mgrpo.config.option import option


@dataclass(frozen=True, kw_only=True)
class VoteConfig:
    """The vote that elects the pseudo-label."""

    rule: Literal["majority", "self-certainty"] = "majority"
    """Weight of a rollout's vote for the pseudo-label: 1, or its self-certainty."""
    pool: Literal["both", "policy", "momentum"] = "both"
    """Models whose rollouts vote."""
    momentum_weight: int = option(1, least=1, most=10**6)
    """Votes of one momentum rollout; with the rule self-certainty, a factor of its weight."""
    min_share: float = option(0.0, least=0, most=1)
    """A prompt whose winner holds a smaller share of the votes gives no signal."""
    min_margin: float = option(0.0, least=0, most=1)
    """A prompt whose winner leads the second answer by a smaller share gives no signal."""
    num_train: int | None = option(None, least=1)
    """Number of the M policy rollouts in the loss; None is all."""
