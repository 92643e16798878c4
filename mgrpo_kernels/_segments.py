"""Sums over the sequences of packed tokens, in a fixed order and differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for every other float."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T] values and [N+1] boundaries -> [N] sums; an empty sequence gives 0."""
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.long(), initial=0.0, unsafe=True)


def segment_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[T] index of the sequence that each packed token belongs to."""
    positions = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)
