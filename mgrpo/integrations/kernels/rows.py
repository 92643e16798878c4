"""Our kernels on logits and hidden states of any shape. Letters: D hidden, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mgrpo_kernels as K


def token_logprob(logits: Tensor, index: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Log-probs at index [...] (zeros by default) and entropies of logits [..., V], both [...] fp32."""
    if index is None:
        index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    result = K.token_logprob(logits.reshape(-1, logits.shape[-1]), index.reshape(-1), **options)
    return result.logprob.view(index.shape), result.entropy.view(index.shape)


def linear_token_logprob(
    hidden: Tensor, weight: Tensor, index: Tensor, *, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`token_logprob` of hidden [..., D] weight^T, weight [V, D], without the logits, in the dtype of autocast."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        rows, index_of_rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype), index.reshape(-1).to(torch.int64)
        bias = None if bias is None else bias.to(dtype)
        result = K.linear_token_logprob(rows, weight.to(dtype), index_of_rows, bias=bias, **options)
    return result.logprob.view(index.shape), result.entropy.view(index.shape)
