"""Tiles of the vocabulary, and gradients of hidden states, weight and bias by tiles, with torch's products."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels._common.rows import RowGrads, dlogits_from_scaled, scale_logits
from mgrpo_kernels._common.segments import accumulation_dtype

_CPU_BUDGET_BYTES = 64 * 2**20


# Block of a product that torch's libraries assign to one multiprocessor.
_BLOCK_ROWS, _BLOCK_COLUMNS = 128, 256


class Tiles(NamedTuple):
    """Division of a vocabulary into tiles."""

    columns: int  # of a tile; the last may have fewer
    kept: list[int]  # columns of the first tiles, whose logits the forward keeps for the backward
    halved: bool  # whether it keeps them in 16 bits


def memory_budget(device: torch.device, budget_bytes: int | None) -> int:
    """Bytes for temporaries; by default 64 MiB, on a GPU a quarter of what is free or unused in torch's cache."""
    if budget_bytes is not None:
        return budget_bytes
    if device.type != "cuda":
        return _CPU_BUDGET_BYTES
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + cached) // 4


def tile_columns(hidden: Tensor, columns: int, budget_bytes: int | None) -> int:
    """Columns a tile: four blocks [T, tile] and two [tile, D] in the accumulation dtype stay within the budget."""
    bytes_a_column = accumulation_dtype(hidden).itemsize * (4 * hidden.shape[0] + 2 * hidden.shape[1])
    return min(columns, max(1, memory_budget(hidden.device, budget_bytes) // bytes_a_column))


def whole_waves(columns: int, num_rows: int, num_processors: int) -> int:
    """The largest number of columns, 1 to `columns`, whose blocks of [T, columns] fill a GPU a whole number of times.

    A partial last wave costs as much as a full one. If not even one wave fits, whole blocks.
    """
    block_rows = max(1, -(-num_rows // _BLOCK_ROWS))
    step = _BLOCK_COLUMNS * num_processors // gcd(block_rows, num_processors)
    if step > columns:
        step = min(columns, _BLOCK_COLUMNS)
    return columns // step * step


def _fit(hidden: Tensor, columns: int, budget_bytes: int, kept_bytes: int, num_processors: int) -> tuple[int, int]:
    """Columns of a tile, and columns that can be kept beside it at `kept_bytes` a logit."""
    # A tile needs two blocks [T, tile] and two [tile, D] of fp32.
    column_bytes, work_bytes = kept_bytes * max(1, len(hidden)), 8 * max(1, sum(hidden.shape))
    # A tile of a few waves is as fast as a larger one: it gets the memory left by kept logits, at least a quarter.
    share = max(budget_bytes - column_bytes * columns, budget_bytes // 4) if kept_bytes else budget_bytes
    tile = max(1, share // work_bytes)
    tile = columns if tile >= columns else whole_waves(tile, len(hidden), num_processors)
    room = max(0, budget_bytes - tile * work_bytes) // column_bytes if kept_bytes else 0
    return tile, columns if room >= columns else room // tile * tile


def plan_tiles(hidden: Tensor, columns: int, budget_bytes: int, *, keep: bool, softcap: float = 0.0) -> Tiles:
    """Tiles for products with row kernels, and with `keep` the kept ones, all within the budget.

    A kept tile spares the backward a third of its products. In fp32 it needs no additional pass; if the logits of bf16
    operands do not all fit, they are kept in 16 bits (see products.py), except with a softcap.
    """
    on_cuda = hidden.device.type == "cuda"
    num_processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count if on_cuda else 1
    tile, kept = _fit(hidden, columns, budget_bytes, 4 if keep else 0, num_processors)
    halved = keep and kept < columns and hidden.dtype == torch.bfloat16 and not softcap
    if halved:
        tile, kept = _fit(hidden, columns, budget_bytes, 2, num_processors)
    return Tiles(tile, [min(tile, kept - start) for start in range(0, kept, tile)], halved)


def full_precision(device: torch.device) -> torch.autocast:
    """A context without autocast; the CPU's for meta tensors, which autocast does not support."""
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
