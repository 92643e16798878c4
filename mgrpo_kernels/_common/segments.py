"""Sums over the sequences of packed tokens, in a fixed order and differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for every other float."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T] values and [N+1] boundaries -> [N] sums; an empty sequence gives 0."""
    if values.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _SegmentSum.apply(values, cu_seqlens)  # pyright: ignore[reportReturnType]
    return _sums(values, cu_seqlens)


def _sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.long(), initial=0.0, unsafe=True)


def segment_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[T] index of the sequence that each packed token belongs to."""
    positions = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)


class _SegmentSum(torch.autograd.Function):
    """torch.segment_reduce with a backward that can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.tokens = values.shape[0]
        return _sums(values, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (cu_seqlens,) = ctx.saved_tensors
        return upstream[segment_ids(cu_seqlens, ctx.tokens)], None
