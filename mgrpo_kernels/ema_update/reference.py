"""Exponential moving average of a list of tensors, in place: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgrpo_kernels._common.segments import accumulation_dtype
from mgrpo_kernels.ema_update.rounding import random_words, round_stochastically

_BLOCK_ELEMENTS = 2**20


def _weight(decay: float | Tensor) -> float | Tensor:
    """Share of the policy, 1 - decay, taken in fp64; on a GPU an invalid decay gives NaN."""
    if not isinstance(decay, Tensor):
        return 1.0 - decay
    if decay.device.type == "cpu":
        return 1.0 - float(decay)
    return torch.where((decay >= 0) & (decay <= 1), 1.0 - decay.double(), torch.nan)


def _blend(momentum: Tensor, policy: Tensor, weight: float | Tensor) -> Tensor:
    """Linear mix momentum + weight (policy - momentum); exact at both ends, also if the other side is non-finite."""
    dtype = accumulation_dtype(momentum)
    old, new = momentum.to(dtype), policy.to(dtype)
    if isinstance(weight, Tensor):
        mixed = old.lerp(new, weight.to(dtype))
        return torch.where(weight == 0, old, torch.where(weight == 1, new, mixed))
    if weight in (0.0, 1.0):
        return old if weight == 0 else new
    return old.lerp(new, weight)


def _store_stochastically(
    momentum: Tensor,
    policy: Tensor,
    weight: float | Tensor,
    seed: Tensor,
    step: Tensor,
    tensor_index: int,
    offset: int,
) -> None:
    """Update a bf16 tensor block by block, because the random words take several times its memory."""
    flat, flat_policy = momentum.view(-1), policy.view(-1)
    for start in range(0, flat.numel(), _BLOCK_ELEMENTS):
        block = slice(start, start + _BLOCK_ELEMENTS)
        mixed = _blend(flat[block], flat_policy[block], weight)
        words = random_words(offset + start, mixed.numel(), seed, step, tensor_index)
        flat[block] = round_stochastically(mixed, words)


def _store_compensated(momentum: Tensor, policy: Tensor, weight: float | Tensor, term: Tensor) -> None:
    """Update momentum + term as one number of twice the precision."""
    if not isinstance(weight, Tensor) and weight == 0.0:
        return
    mixed = _blend(momentum.float() + term.float(), policy, weight)
    momentum.copy_(mixed)
    term.copy_(mixed - momentum.float())


def ema_update_(
    momentum: Sequence[Tensor],
    policy: Sequence[Tensor],
    decay: float | Tensor,
    *,
    rounding: str,
    compensation: Sequence[Tensor | None] | None,
    publish: Sequence[Tensor | None] | None,
    seed: int,
    step: int | Tensor,
    offsets: Sequence[int] | None,
) -> None:
    """See the public function."""
    weight = _weight(decay)
    share = weight if isinstance(weight, float) and 0 < weight < 1 else None
    terms = compensation or [None] * len(momentum)
    plain: list[tuple[Tensor, Tensor]] = []
    for index, (old, new, term) in enumerate(zip(momentum, policy, terms, strict=True)):
        if term is not None:
            _store_compensated(old, new, weight, term)
        elif rounding == "stochastic" and old.dtype == torch.bfloat16:
            key, draw = (torch.as_tensor(value, dtype=torch.int64, device=old.device) for value in (seed, step))
            _store_stochastically(old, new, weight, key, draw, index, offsets[index] if offsets else 0)
        elif old.dtype == new.dtype == torch.float32 and share is not None:
            plain.append((old, new))
        else:
            old.copy_(_blend(old, new, weight))
    if plain and share is not None:
        olds, news = [old for old, _ in plain], [new for _, new in plain]
        torch._foreach_lerp_(olds, news, share)  # pyright: ignore[reportPrivateImportUsage]
    if publish is not None:
        for copy, stored in zip(publish, momentum, strict=True):
            if copy is not None:
                copy.copy_(stored)
