"""Options of the momentum model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mgrpo.config.option import option


@dataclass(frozen=True, kw_only=True)
class MomentumConfig:
    """The momentum model: theta_k <- m theta_k + (1 - m) theta_q."""

    decay: float = option(0.99, least=0, most=1)
    """m, share of the old weights kept at an update. 0 copies the policy, 1 freezes the initial model."""
    schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` moves 1 - m from 1 - decay to 1 - final-decay over the run."""
    final_decay: float = option(0.9999, least=0, most=1)
    """m at the end of the cosine schedule."""
    every: int = option(1, least=1)
    """Optimiser steps between updates."""
    dtype: Literal["fp32", "bf16-stochastic", "bf16-kahan"] = "fp32"
    """Storage. Plain bf16 is not offered: it would round every update away."""
    device: Literal["same", "cpu"] = "same"
    """Device of the weights: the policy's, or the CPU."""
