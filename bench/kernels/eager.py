"""Shared by benchmarks: inputs, and the plain PyTorch expressions of a project without kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def eager_grpo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
) -> Tensor:
    """Clipped loss, token mean; advantage is token-shaped or broadcasts."""
    ratio = torch.exp(logprob - old_logprob)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    if dual_clip is not None:
        surrogate = torch.where(advantage < 0, torch.maximum(surrogate, dual_clip * advantage), surrogate)
    if rollout_logprob is not None:
        surrogate = torch.exp(old_logprob - rollout_logprob).clamp(max=2.0) * surrogate
    loss = -surrogate
    if ref_logprob is not None:
        gap = ref_logprob - logprob
        loss = loss + kl_coef * (torch.exp(gap) - gap - 1)
    if entropy is not None:
        loss = loss - entropy_coef * entropy
    return (loss * mask).sum() / mask.sum()


def eager_logprob(logits: Tensor, targets: Tensor) -> Tensor:
    """log_softmax, then gather, in fp32."""
    return logits.float().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


def eager_logprob_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy from log_softmax in fp32."""
    logps = logits.float().log_softmax(-1)
    return logps.gather(-1, targets[..., None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


def peaked(rows: int, vocabulary: int) -> Tensor:
    """[T, V] normal logits with a few a row raised by 4 to 12, as in mgrpo_kernels.testing but faster."""
    places = torch.randint(vocabulary, (rows, 3))
    return torch.randn(rows, vocabulary).scatter_add_(1, places, 4 + 8 * torch.rand(rows, 3))


def packed_batch(num: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Advantage [T], mask [T] and boundaries [N+1] of sequences of equal length, the last quarter of each masked."""
    length = rows // num
    advantage = torch.randn(num).repeat_interleave(length)
    mask = (torch.arange(length) < length - length // 4).repeat(num)
    return advantage, mask, torch.arange(0, rows + 1, length, dtype=torch.int32)


def old_logprobs(logprob: Tensor) -> Tensor:
    """Old log-probs with ratios below, inside and above the clip range, and none near its edges.

    The gradient jumps at an edge, which a peer that rounds its log-probs to bf16 may cross.
    """
    return logprob + 0.6 * torch.randint(-1, 2, logprob.shape)
