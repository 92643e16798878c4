"""Options of reward, advantage and loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mgrpo.config.option import option


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Reward, advantage and loss."""

    reward: Literal["majority", "soft", "labels", "self-certainty", "entropy"] = "majority"
    """Reward: 1 for the pseudo-label, share of the answer's class, 1 for the true answer, self-certainty, or negative
    entropy."""
    advantage: Literal["std", "mean", "leave-one-out", "sign"] = "std"
    """Group advantage: (r - mean) / std, r - mean (Dr.GRPO), leave-one-out (RLOO), or 2 r - 1."""
    advantage_over: Literal["trained", "all"] = "trained"
    """Rollouts of the mean and the deviation: those in the loss, or all of the G that the filter kept."""
    clip_low: float = option(0.2, least=0, most=1)
    """Lower clip of the ratio, 1 - clip-low."""
    clip_high: float = option(0.2, least=0)
    """Upper clip of the ratio, 1 + clip-high."""
    dual_clip: float | None = option(None, above=1)
    """Bound of the loss at negative advantage, above 1; None is off."""
    kl_coef: float = option(0.005, least=0)
    """Weight of the KL to the reference."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """KL estimator."""
    kl_reference: Literal["initial", "momentum", "none"] = "initial"
    """Reference of the KL."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio per token, or per sequence (GSPO)."""
    reduce: Literal["token-mean", "sequence-mean-token-mean", "constant"] = "token-mean"
    """Normaliser of the loss: response tokens, sequences, or sequences times max-new-tokens (Dr.GRPO)."""
    tis_cap: float = option(2.0, above=0, most=math.inf)
    """Cap of the truncated importance weight between trainer and rollout engine."""
    momentum_in_loss: bool = False
    """Include momentum rollouts in the loss, weighted by min(pi_policy / pi_momentum, tis-cap)."""
    entropy_coef: float = option(0.0, above=-math.inf)
    """Weight of the entropy bonus."""
    kl_cov: float = option(0.0, least=0, most=1)
    """Share of tokens, those of highest log-prob/advantage covariance, with a KL penalty instead of the clip."""
    kl_cov_coef: float = option(1.0, least=0)
    """Weight of the KL-Cov penalty."""
