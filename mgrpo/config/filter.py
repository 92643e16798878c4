"""Options of the IQR filter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mgrpo.config.option import option


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """IQR filter: drops trajectories with entropy below Q1 - k (Q3 - Q1)."""

    k: float = option(0.75, least=0)
    """Factor of the interquartile range."""
    scope: Literal["batch", "prompt"] = "batch"
    """Quartiles over all trajectories of the batch, or over the G of each prompt."""
    applies_to: Literal["vote-and-loss", "loss", "none"] = "vote-and-loss"
    """Where dropped trajectories are excluded; `none` switches the filter off."""
    two_sided: bool = False
    """Also drop above Q3 + k (Q3 - Q1)."""
    entropy: Literal["mean", "sum"] = "mean"
    """Trajectory entropy: mean or sum of the token entropies."""
    score: Literal["policy", "source"] = "policy"
    """Model whose entropy counts: the policy, or the one that generated the trajectory."""
