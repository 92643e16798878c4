"""Log-probability, entropy and log-sum-exp of rows of logits: the specification.

T rows, V columns, z = softcapped logits / temperature. The formulas of the backward are in _common/rows.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels._common.once import once
from mgrpo_kernels._common.rows import (
    FLOOR,
    RowOutputs,
    RowSums,
    active_rows,
    dlogits_from_scaled,
    row_grads,
    row_outputs,
    scale_logits,
    valid_rows,
)
from mgrpo_kernels._common.segments import accumulation_dtype
from mgrpo_kernels.results import TokenLogprob

_BLOCK_ELEMENTS = 2**20


def row_sums(z: Tensor, self_certainty: bool) -> RowSums:
    """Sums over the columns of z [T, V]."""
    # A finite top for rows of -inf avoids inf - inf in later differences.
    top = z.amax(1).clamp_min(torch.finfo(z.dtype).min)
    x = z - top[:, None]
    finite_x = num_finite = torch.zeros_like(top)
    if self_certainty:
        finite = x != -torch.inf
        finite_x, num_finite = x.masked_fill(~finite, 0).sum(1), finite.sum(1).to(z.dtype)
    x.clamp_(min=FLOOR)
    exp = x.exp()
    total = exp.sum(1)
    return RowSums(top, total, exp.mul_(x).sum(1), finite_x, num_finite)


def take(value: float | Tensor, rows: slice) -> float | Tensor:
    """Rows of a per-row tensor; a number stays as it is."""
    return value[rows] if isinstance(value, Tensor) else value


class _TokenLogprob(torch.autograd.Function):
    """One node for all four outputs; processes blocks of rows, so that temporaries are small."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: float | Tensor,
        active: Tensor,
        softcap: float | None,
        self_certainty: bool,
        inplace_backward: bool,
    ) -> tuple[Tensor, ...]:
        rows, vocabulary = logits.shape
        step = max(1, _BLOCK_ELEMENTS // vocabulary)
        columns = targets.clamp(0, vocabulary - 1)
        blocks, counts = [], []
        for start in range(0, max(rows, 1), step):
            block = slice(start, start + step)
            z = scale_logits(logits[block], take(temperature, block), softcap)
            sums = row_sums(z, self_certainty)
            valid = valid_rows(targets[block], take(temperature, block), vocabulary)
            blocks.append(row_outputs(sums, z.gather(1, columns[block, None]).squeeze(1), valid))
            counts.append(sums.num_finite)
        outputs = RowOutputs(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))
        ctx.save_for_backward(logits, columns, active, torch.cat(counts), *outputs[:3])
        ctx.temperature, ctx.softcap, ctx.inplace = temperature, softcap, inplace_backward
        ctx.set_materialize_grads(False)
        return tuple(output.masked_fill(~active, 0) for output in outputs)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, columns, active, num_finite, logprob, entropy, lse = ctx.saved_tensors
        with torch.no_grad():
            coefficients = row_grads(RowOutputs(logprob, entropy, lse, lse), num_finite, grads)
            dlogits = logits.detach() if ctx.inplace else torch.empty_like(logits)
            step = max(1, _BLOCK_ELEMENTS // logits.shape[1])
            for start in range(0, logits.shape[0], step):
                block = slice(start, start + step)
                temperature = take(ctx.temperature, block)
                z = scale_logits(logits[block], temperature, ctx.softcap)
                part = coefficients.take(block)
                dz = dlogits_from_scaled(z, lse[block], columns[block], part, temperature, ctx.softcap)
                dlogits[block] = dz.masked_fill_(~active[block, None], 0)
        return *once("token_logprob", (dlogits,), (logits, *grads)), *[None] * 6


def token_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    mask: Tensor | None,
    softcap: float | None,
    self_certainty: bool,
    inplace_backward: bool,
) -> TokenLogprob:
    """See the public function."""
    if isinstance(temperature, Tensor):
        temperature = temperature.to(accumulation_dtype(logits))
    active = active_rows(targets, mask)
    outputs = _TokenLogprob.apply(logits, targets, temperature, active, softcap, self_certainty, inplace_backward)
    logprob, entropy, lse, certainty = outputs
    return TokenLogprob(logprob, entropy, lse, certainty if self_certainty else None)
