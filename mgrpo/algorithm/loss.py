"""The clipped GRPO objective over one rollout batch, split into micro-batches that add up exactly.

Letters: B prompts, G rollouts a prompt, R trajectories, L longest response, T packed tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

import mgrpo_kernels as K
from mgrpo.config import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs of the loss for R trajectories; zeros at padding."""

    mask: torch.Tensor  # [R, L] bool, response tokens
    advantage: torch.Tensor  # [R] fp32
    old_logprob: torch.Tensor  # [R, L] fp32, policy at the start of the step
    rollout_logprob: torch.Tensor  # [R, L] fp32, what the engine reported
    ref_logprob: torch.Tensor | None  # [R, L] fp32


def normalizer(mask: torch.Tensor, reduce: str, max_length: int) -> torch.Tensor:
    """Denominator of the loss of one optimiser step, from the mask [r, L] of all trajectories in it."""
    if reduce == "token-mean":
        return mask.sum().clamp_min(1).float()
    rollouts = torch.tensor(float(max(len(mask), 1)))
    return rollouts if reduce == "sequence-mean-token-mean" else rollouts * max_length


def has_gradient(advantage: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """[R] bool, False where a trajectory's loss is constant, so that it needs no forward pass."""
    if config.kl_coef or config.entropy_coef or config.kl_cov:
        return torch.ones_like(advantage, dtype=torch.bool)
    return advantage != 0


def kl_cov_tokens(batch: Batch, rows: torch.Tensor, share: float) -> torch.Tensor:
    """The `share` of the response tokens of `rows` with the highest covariance of log-prob and advantage, [R, L] bool.

    cov_t = (logp_t - mean logp) (A_t - mean A), means over those tokens (KL-Cov, arXiv 2505.22617).
    """
    mask = torch.zeros_like(batch.mask)
    mask[rows] = batch.mask[rows]
    logprob, advantage = batch.old_logprob[mask], batch.advantage[:, None].expand(mask.shape)[mask]
    covariance = (logprob - logprob.mean()) * (advantage - advantage.mean())
    chosen = torch.zeros_like(covariance, dtype=torch.bool)
    chosen[covariance.topk(math.ceil(share * len(covariance))).indices] = True
    return torch.zeros_like(mask).masked_scatter(mask, chosen)


def micro_batch_loss(
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    batch: Batch,
    rows: torch.Tensor,
    normalizer: torch.Tensor,
    config: ObjectiveConfig,
    *,
    kl_cov: torch.Tensor | None = None,
    max_length: int | None = None,
    backend: str = "auto",
) -> K.GrpoLoss:
    """Loss of the chosen trajectories, divided by the whole step's normaliser.

    Args:
        logprob: [T] fp32, of the response tokens of `rows`, packed in that order, with gradient.
        entropy: [T] fp32, entropies of the same tokens, with gradient.
        batch: the trajectories.
        rows: [r] int64, chosen trajectories.
        normalizer: 0-d, from `normalizer`.
        config: the objective.
        kl_cov: [R, L] bool, tokens under the KL-Cov penalty.
        max_length: longest response in tokens, for reduce "constant".
        backend: backend of mgrpo_kernels.
    """
    rows = rows[batch.mask[rows].any(1)]  # an empty response adds nothing to the packed tokens
    mask = batch.mask[rows]
    device = logprob.device

    def pack(values: torch.Tensor) -> torch.Tensor:
        return values[rows][mask].to(device)

    advantage = batch.advantage[rows][:, None].expand(mask.shape)[mask].to(device)
    penalised = pack(kl_cov) if kl_cov is not None else None
    clipped = advantage if penalised is None else advantage.masked_fill(penalised, 0.0)
    old_logprob = pack(batch.old_logprob)
    lengths = mask.sum(1)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device, torch.int32)
    result = K.grpo_loss(
        logprob,
        clipped,
        torch.ones_like(logprob, dtype=torch.bool),
        old_logprob=old_logprob,
        ref_logprob=pack(batch.ref_logprob) if batch.ref_logprob is not None else None,
        rollout_logprob=pack(batch.rollout_logprob),
        entropy=entropy,
        cu_seqlens=cu_seqlens,
        kl_coef=config.kl_coef if batch.ref_logprob is not None else 0.0,
        max_length=max_length,
        normalizer=normalizer.to(device),
        backend=backend,
        **_options(config),
    )
    if penalised is None:
        return result
    penalty = _kl_cov_penalty(logprob, old_logprob, pack(batch.rollout_logprob), advantage, config)
    if config.reduce == "sequence-mean-token-mean":
        penalty = penalty * (1 / torch.repeat_interleave(lengths, lengths).to(device))
    return result._replace(loss=result.loss + penalty[penalised].sum() / normalizer.to(device))


def _options(config: ObjectiveConfig) -> dict[str, Any]:
    """Options of the loss as the kernel takes them."""
    return {
        "clip_low": config.clip_low,
        "clip_high": config.clip_high,
        "dual_clip": config.dual_clip,
        "kl": config.kl,
        "entropy_coef": config.entropy_coef,
        "tis_cap": min(config.tis_cap, torch.finfo(torch.float32).max),
        "ratio": config.ratio,
        "reduce": config.reduce.replace("-", "_"),
    }


def _kl_cov_penalty(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    rollout_logprob: torch.Tensor,
    advantage: torch.Tensor,
    config: ObjectiveConfig,
) -> torch.Tensor:
    """[T] fp32, loss of a token under KL-Cov: the unclipped objective plus a penalty on |log ratio|."""
    log_ratio = logprob - old_logprob
    importance = (old_logprob - rollout_logprob).exp().clamp_max(config.tis_cap)
    return -importance * advantage * log_ratio.exp() + config.kl_cov_coef * log_ratio.abs()
