"""Results of the public functions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenLogprob(NamedTuple):
    """Per-row results of `token_logprob` and `linear_token_logprob`, all differentiable."""

    logprob: Tensor
    """[T] fp32, log-probability of the target in nats, <= 0."""
    entropy: Tensor
    """[T] fp32, entropy of the row's distribution in nats, >= 0."""
    lse: Tensor
    """[T] fp32, log-sum-exp of the scaled logits."""
    self_certainty: Tensor | None
    """[T] fp32, lse minus the mean of the finite scaled logits; None unless asked for."""


class MajorityVote(NamedTuple):
    """Per-prompt results of `majority_vote`."""

    label: Tensor
    """[B] int64, the winning answer; -1 where nobody voted."""
    share: Tensor
    """[B] fp32 in [0, 1], votes of the winner over the votes of all kept rollouts."""
    margin: Tensor
    """[B] fp32 in [0, 1], votes of the winner less those of the second, over the same denominator."""
    tie: Tensor
    """[B] bool, whether two answers led before the tie rule."""
    class_share: Tensor
    """[B, G] fp32 in [0, 1], share of each rollout's own answer; 0 for no answer."""


class IqrFilter(NamedTuple):
    """Results of `iqr_filter`."""

    keep: Tensor
    """[B, G] bool, False for the dropped entries."""
    q1: Tensor
    """First quartile of the entropy: 0-d, or [B] with scope "prompt"."""
    q3: Tensor
    """Third quartile, shaped as q1."""


class GrpoLoss(NamedTuple):
    """Results of the three losses."""

    loss: Tensor
    """0-d fp32, differentiable."""
    metrics: dict[str, Tensor]
    """0-d fp32, detached: ratio_mean, clip_low_share, clip_high_share, kl, entropy, tis_mean, tis_clipped_share."""
