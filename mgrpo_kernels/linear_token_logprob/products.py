"""The GPU backends: vocabulary tiles of logits by torch.mm around the row kernels of token_logprob.

A tile's statistics are those of token_logprob on its columns, about the tile's own log-sum-exp, and merge as sums do;
its gradient is token_logprob's backward about the log-sum-exp of all tiles. Logits are fp32, products fp32-accumulated;
gradients of bf16 logits are rounded to bf16 before the two products that take them. Letters: see the package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mgrpo_kernels import ops  # noqa: F401  (defines torch.ops.mgrpo_kernels)
from mgrpo_kernels._rows import RowSums, scale_logits
from mgrpo_kernels.linear_token_logprob.tiles import full_precision, tile_columns

_LOWEST = torch.finfo(torch.float32).min


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product in fp32: half operands go through the tensor cores of a GPU, and are upcast elsewhere."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _tile_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, tile] fp32."""
    logits = _product(hidden, weight.T)
    return logits if bias is None else logits.add_(bias.float())


def cuda_row_sums(
    logits: Tensor,
    columns: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    self_certainty: bool,
) -> tuple[Tensor, ...]:
    """RowSums about the log-sum-exp that the CUDA kernel finds of a tile; then z of the target, or 0."""
    index = columns.clamp(0, logits.shape[1] - 1)
    picked = logits.gather(1, index[:, None])
    scale = temperature if temperatures is None else temperatures
    z_target = scale_logits(picked, scale, softcap or None).squeeze(1).masked_fill(columns != index, 0)
    _, entropy, lse, certainty, num_finite = torch.ops.mgrpo_kernels.token_logprob_fwd(
        logits, index, None, temperature, temperatures, softcap, self_certainty, "cpu" if logits.is_cpu else "cuda"
    )
    empty = lse == -torch.inf
    top, exp = lse.masked_fill(empty, _LOWEST), torch.ones_like(lse).masked_fill(empty, 0)
    if not self_certainty:
        certainty = num_finite = torch.zeros_like(lse)
    finite_x = (-certainty * num_finite).masked_fill(empty, 0)
    return top, exp, (-entropy).masked_fill(empty, 0), finite_x, num_finite, z_target


def linear_token_logprob_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    budget_bytes: int | None,
    self_certainty: bool,
    *,
    row_sums: Callable[..., tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """See ops.py; `row_sums` gives the sums of a tile of logits, and z of the targets that lie in it."""
    tile = tile_columns(hidden, weight.shape[0], budget_bytes)
    z_target, sums = hidden.new_zeros(hidden.shape[0], dtype=torch.float32), None
    with full_precision(hidden.device):
        for start in range(0, weight.shape[0], tile):
            block = slice(start, start + tile)
            logits = _tile_logits(hidden, weight[block], None if bias is None else bias[block])
            *part, picked = row_sums(logits, columns - start, temperature, temperatures, softcap, self_certainty)
            z_target += picked
            sums = RowSums(*part) if sums is None else sums.merge(RowSums(*part))
    assert sums is not None
    return *sums, z_target


def linear_token_logprob_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    budget_bytes: int | None,
    logprob: Tensor,
    lse: Tensor,
    constant: Tensor,
    onehot: Tensor | None,
    slope: Tensor | None,
    uniform: Tensor | None,
    fp32_dhidden: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.py."""
    tile = tile_columns(hidden, weight.shape[0], budget_bytes)
    dhidden = hidden.new_zeros(hidden.shape if needs_hidden else (0, 0), dtype=torch.float32)
    dweight = weight.new_empty(weight.shape if needs_weight else (0, 0))
    dbias = hidden.new_empty(weight.shape[0] if needs_bias else 0, dtype=torch.float32)
    # The row kernel makes its coefficients from upstream gradients: these give the ones at hand.
    dlse = constant if uniform is None else constant - uniform
    dentropy, no_entropy, one = None if slope is None else -slope, torch.zeros_like(lse), torch.ones_like(lse)
    with full_precision(hidden.device):
        for start in range(0, weight.shape[0], tile):
            block = slice(start, start + tile)
            dlogits = _tile_logits(hidden, weight[block], None if bias is None else bias[block])
            index = (columns - start).clamp(0, dlogits.shape[1] - 1)
            here = columns - start == index
            own = None if onehot is None else onehot.masked_fill(~here, 0)
            torch.ops.mgrpo_kernels.token_logprob_bwd_(
                dlogits,
                index,
                None,
                temperature,
                temperatures,
                softcap,
                # A row whose target lies elsewhere has, for the kernel, one of probability 0.
                logprob.masked_fill(~here, -torch.inf),
                no_entropy,
                lse,
                one,
                own,
                dentropy,
                dlse if own is None else dlse + own,
                uniform,
                backend,
            )
            if needs_bias:
                dbias[block] = dlogits.sum(0)
            # fp16 has no room for the small ones.
            if hidden.dtype == torch.bfloat16:
                dlogits = dlogits.to(torch.bfloat16)
            if needs_hidden:
                dhidden += _product(dlogits, weight[block] if dlogits.dtype == weight.dtype else weight[block].float())
            if needs_weight:
                dweight[block] = _product(dlogits.T, hidden if dlogits.dtype == hidden.dtype else hidden.float())
    return dhidden if fp32_dhidden else dhidden.to(hidden.dtype), dweight, dbias
