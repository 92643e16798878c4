"""Log-probability and entropy from hidden states and the head's weight: the specification.

T rows, D hidden, V vocabulary. Walks tiles of the vocabulary, so that weight and dweight are touched once and the
logits never exist as a whole; the backward computes each tile again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mgrpo_kernels._segments import accumulation_dtype
from mgrpo_kernels.results import TokenLogprob
from mgrpo_kernels.token_logprob.reference import (
    RowOutputs,
    RowSums,
    active_rows,
    dlogits_from_scaled,
    row_grads,
    row_outputs,
    row_sums,
    scale_logits,
    valid_rows,
)

_CPU_BUDGET_BYTES = 64 * 2**20


class Shard(NamedTuple):
    """The vocabulary range that this process holds."""

    start: int
    vocabulary: int
    group: dist.ProcessGroup | None


class _Options(NamedTuple):
    """What is not a tensor."""

    softcap: float | None
    self_certainty: bool
    tile: int
    shard: Shard


def find_shard(columns: int, group: dist.ProcessGroup | None, device: torch.device) -> Shard:
    """Where `columns` local columns lie in the whole vocabulary; shards are in rank order, of any size."""
    if group is None:
        return Shard(0, columns, None)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([columns], device=device), group=group)
    counts = torch.cat(sizes).tolist()
    return Shard(sum(counts[: dist.get_rank(group)]), sum(counts), group)


def tile_columns(hidden: Tensor, columns: int, budget_bytes: int | None) -> int:
    """Columns a tile: four blocks [T, tile] and two [tile, D] in the accumulation dtype stay within the budget."""
    if budget_bytes is None:
        on_cuda = hidden.device.type == "cuda"
        budget_bytes = torch.cuda.mem_get_info(hidden.device)[0] // 4 if on_cuda else _CPU_BUDGET_BYTES
    bytes_a_column = accumulation_dtype(hidden).itemsize * (4 * hidden.shape[0] + 2 * hidden.shape[1])
    return min(columns, max(1, budget_bytes // bytes_a_column))


def _merge_over_group(sums: RowSums, z_target: Tensor, group: dist.ProcessGroup) -> tuple[RowSums, Tensor]:
    """Sums and target logits over every shard of the vocabulary."""
    top = sums.top.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    totals = torch.stack([*sums.shift(top)[1:], z_target])
    dist.all_reduce(totals, dist.ReduceOp.SUM, group=group)
    return RowSums(top, *totals[:4]), totals[4]


def _tile_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, tile] logits of upcast operands."""
    logits = hidden @ weight.T
    return logits if bias is None else logits.add_(bias.to(logits.dtype))


class _LinearTokenLogprob(torch.autograd.Function):
    """One node for all four outputs."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float | Tensor,
        options: _Options,
    ) -> tuple[Tensor, ...]:
        softcap, self_certainty, tile, shard = options
        dtype = accumulation_dtype(hidden)
        local = targets - shard.start
        with torch.autocast(hidden.device.type, enabled=False):
            upcast = hidden.to(dtype)
            z_target = upcast.new_zeros(hidden.shape[0])
            sums = None
            for start in range(0, weight.shape[0], tile):
                block = slice(start, start + tile)
                logits = _tile_logits(upcast, weight[block].to(dtype), None if bias is None else bias[block])
                z = scale_logits(logits, temperature, softcap)
                part = row_sums(z, self_certainty)
                sums = part if sums is None else sums.merge(part)
                index = (local - start).clamp(0, z.shape[1] - 1)
                here = local - start == index
                z_target = torch.where(here, z.gather(1, index[:, None]).squeeze(1), z_target)
        assert sums is not None
        if shard.group is not None:
            sums, z_target = _merge_over_group(sums, z_target, shard.group)
        outputs = row_outputs(sums, z_target, valid_rows(targets, temperature, shard.vocabulary))
        ctx.save_for_backward(hidden, weight, bias, local, sums.num_finite, *outputs[:3])
        ctx.temperature, ctx.options = temperature, options
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, local, num_finite, logprob, entropy, lse = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        softcap, _, tile, shard = ctx.options
        coefficients = row_grads(RowOutputs(logprob, entropy, lse, lse), num_finite, grads)
        dweight = torch.empty_like(weight) if needs_weight else None
        dbias = torch.empty_like(bias) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            upcast = hidden.to(lse.dtype)
            dhidden = torch.zeros_like(upcast) if needs_hidden else None
            for start in range(0, weight.shape[0], tile):
                block = slice(start, start + tile)
                upcast_weight = weight[block].to(lse.dtype)
                logits = _tile_logits(upcast, upcast_weight, None if bias is None else bias[block])
                z = scale_logits(logits, ctx.temperature, softcap)
                dlogits = dlogits_from_scaled(z, lse, local - start, coefficients, ctx.temperature, softcap)
                if dhidden is not None:
                    dhidden.addmm_(dlogits, upcast_weight)
                if dweight is not None:
                    dweight[block] = dlogits.T @ upcast
                if dbias is not None:
                    dbias[block] = dlogits.sum(0)
        if dhidden is not None:
            if shard.group is not None:
                dist.all_reduce(dhidden, group=shard.group)
            dhidden = dhidden.to(hidden.dtype)
        return dhidden, dweight, dbias, None, None, None


def linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    mask: Tensor | None,
    softcap: float | None,
    self_certainty: bool,
    budget_bytes: int | None,
    shard: Shard,
) -> TokenLogprob:
    """See the public function."""
    if isinstance(temperature, Tensor):
        temperature = temperature.to(accumulation_dtype(hidden))
    active = active_rows(targets, mask)
    num_rows, rows = hidden.shape[0], None
    if torch.compiler.is_compiling():
        # The number of active rows is unknown to a compiler: keep them all, and let no value of a masked one through.
        hidden = hidden.masked_fill(~active[:, None], 0)
        targets = targets.masked_fill(~active, 0)
        if isinstance(temperature, Tensor):
            temperature = temperature.masked_fill(~active, 1)
    else:
        rows = active.nonzero().squeeze(1)
        hidden, targets = hidden.index_select(0, rows), targets[rows]
        temperature = temperature[rows] if isinstance(temperature, Tensor) else temperature
    options = _Options(softcap, self_certainty, tile_columns(hidden, weight.shape[0], budget_bytes), shard)
    outputs = _LinearTokenLogprob.apply(hidden, weight, bias, targets, temperature, options)
    if rows is None:
        outputs = [output.masked_fill(~active, 0) for output in outputs]
    else:
        outputs = [output.new_zeros(num_rows).index_copy(0, rows, output) for output in outputs]
    logprob, entropy, lse, certainty = outputs
    return TokenLogprob(logprob, entropy, lse, certainty if self_certainty else None)
