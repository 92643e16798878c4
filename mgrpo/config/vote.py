"""Options of the vote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mgrpo.config.option import option


@dataclass(frozen=True, kw_only=True)
class VoteConfig:
    """The vote that elects the pseudo-label."""

    rule: Literal["majority"] = "majority"
    """How the pseudo-label is elected."""
    pool: Literal["both", "policy", "momentum"] = "both"
    """Whose rollouts vote."""
    momentum_weight: int = option(1, least=1, most=10**6)
    """Votes of one momentum rollout."""
    min_share: float = option(0.0, least=0, most=1)
    """A prompt whose majority holds a smaller share of the votes gives no signal."""
    min_margin: float = option(0.0, least=0, most=1)
    """A prompt whose majority leads the second answer by a smaller share gives no signal."""
    num_train: int | None = option(None, least=1)
    """How many of the M policy rollouts train; all of them when None."""
