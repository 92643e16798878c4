"""Gradients of hidden states, weight and bias by tiles of the vocabulary, with torch's own products."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels._rows import RowGrads, dlogits_from_scaled, scale_logits
from mgrpo_kernels._segments import accumulation_dtype

_CPU_BUDGET_BYTES = 64 * 2**20


def tile_columns(hidden: Tensor, columns: int, budget_bytes: int | None) -> int:
    """Columns a tile: four blocks [T, tile] and two [tile, D] in the accumulation dtype stay within the budget."""
    if budget_bytes is None:
        on_cuda = hidden.device.type == "cuda"
        budget_bytes = torch.cuda.mem_get_info(hidden.device)[0] // 4 if on_cuda else _CPU_BUDGET_BYTES
    bytes_a_column = accumulation_dtype(hidden).itemsize * (4 * hidden.shape[0] + 2 * hidden.shape[1])
    return min(columns, max(1, budget_bytes // bytes_a_column))


def full_precision(device: torch.device) -> torch.autocast:
    """A context without autocast, which knows nothing of tensors without data."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def tile_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, tile] logits of upcast operands."""
    logits = hidden @ weight.T
    return logits if bias is None else logits.add_(bias.to(logits.dtype))


def gradients_by_tiles(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    lse: Tensor,
    coefficients: RowGrads,
    tile: int,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Dhidden in the accumulation dtype, dweight and dbias in their own, None where not needed.

    Each tile's logits are computed again; `columns` are the targets among the rows of `weight`.
    """
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needed[1] else None
    dbias = None if bias is None or not needed[2] else torch.empty_like(bias)
    with full_precision(hidden.device):
        upcast = hidden.to(lse.dtype)
        dhidden = torch.zeros_like(upcast) if needed[0] else None
        for start in range(0, weight.shape[0], tile):
            block = slice(start, start + tile)
            upcast_weight = weight[block].to(lse.dtype)
            logits = tile_logits(upcast, upcast_weight, None if bias is None else bias[block])
            z = scale_logits(logits, temperature, softcap)
            dlogits = dlogits_from_scaled(z, lse, columns - start, coefficients, temperature, softcap)
            if dhidden is not None:
                dhidden.addmm_(dlogits, upcast_weight)
            if dweight is not None and dweight.dtype == dlogits.dtype:
                torch.mm(dlogits.T, upcast, out=dweight[block])
            elif dweight is not None:
                dweight[block] = dlogits.T @ upcast
            if dbias is not None:
                dbias[block] = dlogits.sum(0)
    return dhidden, dweight, dbias
