"""One autograd node for all four outputs, over the forward and backward of any compiled backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo_kernels import ops  # noqa: F401  (defines torch.ops.mgrpo_kernels)
from mgrpo_kernels._common.once import once
from mgrpo_kernels._common.rows import RowGrads, RowOutputs, RowSums, row_grads, row_outputs, valid_rows
from mgrpo_kernels._common.shards import Shard, merge_over_group
from mgrpo_kernels.linear_token_logprob.active import on_active_rows
from mgrpo_kernels.linear_token_logprob.tiles import Tiles, memory_budget, plan_tiles
from mgrpo_kernels.results import TokenLogprob


class _Options(NamedTuple):
    """Options that are not tensors."""

    softcap: float
    self_certainty: bool
    budget_bytes: int | None
    shard: Shard
    backend: str
    keep: bool  # whether to keep logits within the budget


def _live_rows(grads: RowGrads) -> Tensor | None:
    """Rows with a gradient; None for all, or if counting them would wait for the device."""
    if torch.compiler.is_compiling() or grads.constant.device.type != "cpu":
        return None
    live = grads.constant != 0
    for term in grads[1:]:
        if term is not None:
            live |= term != 0
    return None if live.all() else live.nonzero().squeeze(1)


class _LinearTokenLogprob(torch.autograd.Function):
    """Saves the inputs, one number a row and output, and kept logits; the others are computed again."""

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
        shard = options.shard
        local = targets - shard.start
        scale = (1.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)
        tiles = Tiles(0, [], False)
        if options.keep:
            # The budget is computed once: in the backward the free memory would exclude the kept logits.
            budget = memory_budget(hidden.device, options.budget_bytes)
            options = options._replace(budget_bytes=budget)
            tiles = plan_tiles(hidden, weight.shape[0], budget, keep=True, softcap=options.softcap)
        head = (hidden, weight, bias, local, *scale, options.softcap, options.budget_bytes)
        *sums, z_target, kept, anchors = torch.ops.mgrpo_kernels.linear_token_logprob_fwd(
            *head, options.self_certainty, tiles.kept, tiles.halved, options.backend
        )
        sums = RowSums(*sums)
        if shard.group is not None:
            sums, z_target = merge_over_group(sums, z_target, shard.group)
        outputs = row_outputs(sums, z_target, valid_rows(targets, temperature, shard.vocabulary))
        ctx.save_for_backward(hidden, weight, bias, local, scale[1], sums.num_finite, *outputs[:3], *kept, *anchors)
        ctx.temperature, ctx.options, ctx.num_kept = scale[0], options, len(kept)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = _gradients(ctx, saved, grads)
        return *once("linear_token_logprob", gradients, (*saved[:3], *grads)), None, None, None


def _gradients(ctx: Any, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias, None where not needed."""
    hidden, weight, bias, local, temperatures, num_finite, logprob, entropy, lse, *rest = saved
    kept, anchors = rest[: ctx.num_kept], rest[ctx.num_kept :]
    options, needed = ctx.options, ctx.needs_input_grad[:3]
    coefficients = row_grads(RowOutputs(logprob, entropy, lse, lse), num_finite, grads)
    num_rows, rows = hidden.shape[0], None if kept else _live_rows(coefficients)
    if rows is not None:
        hidden, local, coefficients = hidden[rows], local[rows], coefficients.take(rows)
        logprob, lse = logprob[rows], lse[rows]
        temperatures = None if temperatures is None else temperatures[rows]
    group = options.shard.group
    dhidden, dweight, dbias = torch.ops.mgrpo_kernels.linear_token_logprob_bwd(
        hidden,
        weight,
        bias,
        local,
        ctx.temperature,
        temperatures,
        options.softcap,
        options.budget_bytes,
        logprob,
        lse,
        *coefficients,
        kept,
        anchors,
        group is not None,
        *needed,
        options.backend,
    )
    if needed[0] and group is not None:
        dist.all_reduce(dhidden, group=group)
        dhidden = dhidden.to(hidden.dtype)
    if needed[0] and rows is not None:
        dhidden = dhidden.new_zeros(num_rows, dhidden.shape[1]).index_copy_(0, rows, dhidden)
    return (
        dhidden if needed[0] else None,
        dweight if needed[1] else None,
        dbias.to(bias.dtype) if needed[2] else None,
    )


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
    backend: str,
) -> TokenLogprob:
    """See the public function."""
    needs_grad = any(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))
    # The CPU library keeps none. A compiled graph would fix the free memory of the time of its tracing.
    keep = backend != "cpu" and torch.is_grad_enabled() and needs_grad
    keep = keep and not (budget_bytes is None and torch.compiler.is_compiling())
    options = _Options(softcap or 0.0, self_certainty, budget_bytes, shard, backend, keep)

    def node(hidden: Tensor, targets: Tensor, temperature: float | Tensor) -> tuple[Tensor, ...]:
        return _LinearTokenLogprob.apply(hidden, weight, bias, targets, temperature, options)

    temperature = temperature.float() if isinstance(temperature, Tensor) else float(temperature)
    return on_active_rows(node, hidden, targets, temperature, mask, self_certainty)
