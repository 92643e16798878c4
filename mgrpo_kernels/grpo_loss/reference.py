"""Clipped policy-gradient losses on log-probs, on logits and on hidden states: the specification.

N sequences, T packed tokens or [N, L] padded ones; "token-shaped" is either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels._common.once import once_input
from mgrpo_kernels._common.segments import accumulation_dtype, segment_ids, segment_sum
from mgrpo_kernels._common.shards import Shard
from mgrpo_kernels._common.structs import LossInputs, LossOptions
from mgrpo_kernels.linear_token_logprob.reference import linear_token_logprob
from mgrpo_kernels.results import GrpoLoss
from mgrpo_kernels.token_logprob.reference import token_logprob

# Stands for -inf, so that two of them differ by 0; e^(-1e4) is exactly 0.
_LEAST_LOGPROB = -1e4


class _Sequences:
    """Sums over sequences and back, for both layouts."""

    def __init__(self, inputs: LossInputs):
        self._cu_seqlens = inputs.cu_seqlens
        self._ids = None if inputs.cu_seqlens is None else segment_ids(inputs.cu_seqlens, inputs.mask.shape[0])
        self.num = inputs.num_sequences

    def sum(self, values: Tensor) -> Tensor:
        """Token-shaped -> [N]."""
        return values.sum(1) if self._cu_seqlens is None else segment_sum(values, self._cu_seqlens)

    def expand(self, values: Tensor, like: Tensor) -> Tensor:
        """[N] -> token-shaped."""
        return values[:, None].expand_as(like) if self._ids is None else values[self._ids]


def _clean(values: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-probs with masked tokens at 0 and -inf replaced by LEAST_LOGPROB."""
    return torch.where(mask, values.to(dtype), 0).clamp_min(_LEAST_LOGPROB)


def _kl(logprob: Tensor, ref_logprob: Tensor, kind: str) -> Tensor:
    """Token estimate of KL(policy || reference) from samples of the policy."""
    log_ratio = ref_logprob - logprob
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    return torch.expm1(log_ratio) - log_ratio


def _surrogate(log_ratio: Tensor, advantage: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """min(ratio A, clip(ratio) A), bounded by dual_clip A for A < 0; and the detached ratio."""
    ratio = log_ratio.detach().exp()
    product = ratio * advantage
    value = torch.minimum(product, ratio.clamp(1 - options.clip_low, 1 + options.clip_high) * advantage)
    if options.dual_clip is not None:
        value = torch.where(advantage < 0, torch.maximum(value, options.dual_clip * advantage), value)
    # An overflowing ratio must not reach the backward of a clipped token: 0 * inf is NaN there.
    moves = product == value
    live = torch.where(moves, log_ratio, 0).exp() * advantage
    held = torch.where(advantage == 0, 0, value)
    return torch.where(moves, live, held), ratio


def _reduce(losses: Tensor, sequences: _Sequences, inputs: LossInputs, options: LossOptions) -> Tensor:
    """0-d loss from token losses that are 0 outside the mask."""
    mask = inputs.mask
    if options.reduce == "sequence_mean_token_mean":
        total = (sequences.sum(losses) / sequences.sum(mask.to(losses.dtype)).clamp_min(1)).sum()
        default = max(sequences.num, 1)
    elif options.reduce == "token_mean":
        total, default = losses.sum(), mask.sum().clamp_min(1)
    else:
        total, default = losses.sum(), max(sequences.num, 1) * (options.max_length or 1)
    if inputs.normalizer is not None:
        return total / inputs.normalizer.to(total.dtype)
    denominator = default if options.denominator is None else options.denominator
    return total / (denominator.to(total.dtype) if isinstance(denominator, Tensor) else denominator)


def _log_ratio(current: Tensor, old: Tensor, mask: Tensor, sequences: _Sequences, kind: str) -> Tensor:
    """Token log-ratio, or its mean over the sequence, with the gradient of the token's own log-ratio."""
    if kind == "token":
        return current - old
    counts = sequences.sum(mask.to(current.dtype)).clamp_min(1)
    mean = sequences.sum(current.detach() - old) / counts
    return sequences.expand(mean, mask) + (current - current.detach())


def _metrics(
    terms: dict[str, Tensor], ratio: Tensor, advantage: Tensor, mask: Tensor, options: LossOptions
) -> dict[str, Tensor]:
    """Means and shares over the mask."""
    measures = {
        "ratio_mean": ratio,
        "clip_low_share": (ratio < 1 - options.clip_low) & (advantage < 0),
        "clip_high_share": (ratio > 1 + options.clip_high) & (advantage > 0),
        "kl": terms["kl"],
        "entropy": terms["entropy"],
        "tis_mean": terms["weight"].clamp_max(options.tis_cap),
        "tis_clipped_share": terms["weight"] > options.tis_cap,
    }
    tokens = mask.sum().clamp_min(1)
    return {name: (torch.where(mask, values.detach(), 0).sum() / tokens).float() for name, values in measures.items()}


def grpo_loss(logprob: Tensor, entropy: Tensor | None, inputs: LossInputs, options: LossOptions) -> GrpoLoss:
    """See the public function."""
    # Detached terms, including the ratio of a sequence, would be missing in a second derivative.
    logprob, entropy = once_input("grpo_loss", logprob), None if entropy is None else once_input("grpo_loss", entropy)
    dtype = accumulation_dtype(logprob)
    mask, sequences = inputs.mask, _Sequences(inputs)
    current = _clean(logprob, mask, dtype)
    old = current.detach() if inputs.old_logprob is None else _clean(inputs.old_logprob.detach(), mask, dtype)
    advantage = inputs.advantage.detach().to(dtype)
    if inputs.by_sequence:
        advantage = sequences.expand(advantage, mask)
    advantage = torch.where(mask, advantage, 0)
    surrogate, ratio = _surrogate(_log_ratio(current, old, mask, sequences, options.ratio), advantage, options)

    terms = {"kl": torch.zeros_like(ratio), "entropy": torch.zeros_like(ratio), "weight": torch.ones_like(ratio)}
    if inputs.rollout_logprob is not None:
        terms["weight"] = (old - _clean(inputs.rollout_logprob.detach(), mask, dtype)).exp()
        surrogate = terms["weight"].clamp_max(options.tis_cap) * surrogate
    losses = -surrogate
    # A coefficient of 0 leaves its term out of the graph, so that an infinite KL makes no 0 * inf.
    if inputs.ref_logprob is not None:
        policy = current if options.kl_coef else current.detach()
        terms["kl"] = _kl(policy, _clean(inputs.ref_logprob.detach(), mask, dtype), options.kl)
        losses = losses + options.kl_coef * terms["kl"] if options.kl_coef else losses
    if entropy is not None:
        terms["entropy"] = torch.where(mask, (entropy if options.entropy_coef else entropy.detach()).to(dtype), 0)
        losses = losses - options.entropy_coef * terms["entropy"] if options.entropy_coef else losses
    loss = _reduce(torch.where(mask, losses, 0), sequences, inputs, options)
    return GrpoLoss(loss, _metrics(terms, ratio, advantage, mask, options))


def logits_grpo_loss(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor, inputs: LossInputs, options: LossOptions
) -> GrpoLoss:
    """See the public function."""
    rows = token_logprob(
        logits,
        targets,
        temperature=temperature,
        mask=inputs.mask,
        softcap=None,
        self_certainty=False,
        inplace_backward=False,
    )
    return grpo_loss(rows.logprob, rows.entropy, inputs.with_targets(targets), options)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    budget_bytes: int | None,
    shard: Shard,
    inputs: LossInputs,
    options: LossOptions,
) -> GrpoLoss:
    """See the public function."""
    rows = linear_token_logprob(
        hidden,
        weight,
        targets,
        bias=None,
        temperature=temperature,
        mask=inputs.mask,
        softcap=None,
        self_certainty=False,
        budget_bytes=budget_bytes,
        shard=shard,
    )
    return grpo_loss(rows.logprob, rows.entropy, inputs.with_targets(targets), options)
