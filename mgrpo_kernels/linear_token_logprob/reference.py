"""Log-probability and entropy from hidden states and the head's weight: the specification.

T rows, D hidden, V vocabulary. Processes tiles of the vocabulary, so that weight and dweight are accessed once and the
logits are never materialised; the backward computes each tile again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo_kernels._common.once import once
from mgrpo_kernels._common.rows import RowOutputs, row_grads, row_outputs, scale_logits, valid_rows
from mgrpo_kernels._common.segments import accumulation_dtype
from mgrpo_kernels._common.shards import Shard, merge_over_group
from mgrpo_kernels.linear_token_logprob.active import on_active_rows
from mgrpo_kernels.linear_token_logprob.tiles import full_precision, gradients_by_tiles, tile_columns, tile_logits
from mgrpo_kernels.results import TokenLogprob
from mgrpo_kernels.token_logprob.reference import row_sums


class _Options(NamedTuple):
    """Options that are not tensors."""

    softcap: float | None
    self_certainty: bool
    tile: int
    shard: Shard


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
        with full_precision(hidden.device):
            upcast = hidden.to(dtype)
            z_target = upcast.new_zeros(hidden.shape[0])
            sums = None
            for start in range(0, weight.shape[0], tile):
                block = slice(start, start + tile)
                logits = tile_logits(upcast, weight[block].to(dtype), None if bias is None else bias[block])
                z = scale_logits(logits, temperature, softcap)
                part = row_sums(z, self_certainty)
                sums = part if sums is None else sums.merge(part)
                index = (local - start).clamp(0, z.shape[1] - 1)
                here = local - start == index
                z_target = torch.where(here, z.gather(1, index[:, None]).squeeze(1), z_target)
        assert sums is not None
        if shard.group is not None:
            sums, z_target = merge_over_group(sums, z_target, shard.group)
        outputs = row_outputs(sums, z_target, valid_rows(targets, temperature, shard.vocabulary))
        ctx.save_for_backward(hidden, weight, bias, local, sums.num_finite, *outputs[:3])
        ctx.temperature, ctx.options = temperature, options
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, local, num_finite, logprob, entropy, lse = ctx.saved_tensors
        softcap, _, tile, shard = ctx.options
        with torch.no_grad():
            coefficients = row_grads(RowOutputs(logprob, entropy, lse, lse), num_finite, grads)
            dhidden, *others = gradients_by_tiles(
                hidden,
                weight,
                bias,
                local,
                temperature=ctx.temperature,
                softcap=softcap,
                lse=lse,
                coefficients=coefficients,
                tile=tile,
                needed=ctx.needs_input_grad[:3],
            )
            if dhidden is not None:
                if shard.group is not None:
                    dist.all_reduce(dhidden, group=shard.group)
                dhidden = dhidden.to(hidden.dtype)
        return *once("linear_token_logprob", (dhidden, *others), (hidden, weight, bias, *grads)), None, None, None


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

    def node(hidden: Tensor, targets: Tensor, temperature: float | Tensor) -> tuple[Tensor, ...]:
        options = _Options(softcap, self_certainty, tile_columns(hidden, weight.shape[0], budget_bytes), shard)
        return _LinearTokenLogprob.apply(hidden, weight, bias, targets, temperature, options)

    if isinstance(temperature, Tensor):
        temperature = temperature.to(accumulation_dtype(hidden))
    return on_active_rows(node, hidden, targets, temperature, mask, self_certainty)
