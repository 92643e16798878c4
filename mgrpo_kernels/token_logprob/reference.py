"""Log-probability, entropy and log-sum-exp of rows of logits: the specification.

T rows, V columns, z = softcapped logits / temperature. The formulas of the backward are in _rows.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mgrpo_kernels._rows import RowGrads, RowOutputs, RowSums, active_rows, row_grads, row_outputs, valid_rows
from mgrpo_kernels._segments import accumulation_dtype
from mgrpo_kernels.results import TokenLogprob

# exp of it is exactly 0 in fp32 and fp64: clamping there keeps exp(x) * x at 0 where x is -inf.
_FLOOR = -1e4
_BLOCK_ELEMENTS = 2**20


def scale_logits(logits: Tensor, temperature: float | Tensor, softcap: float | None) -> Tensor:
    """Upcast first, so that neither the softcap nor the temperature rounds the logits."""
    z = logits.to(accumulation_dtype(logits))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def row_sums(z: Tensor, self_certainty: bool) -> RowSums:
    """Sums over the columns of z [T, V]."""
    # A finite stand-in for the top of a row of -inf keeps every later difference free of inf - inf.
    top = z.amax(1).clamp_min(torch.finfo(z.dtype).min)
    x = z - top[:, None]
    finite_x = num_finite = torch.zeros_like(top)
    if self_certainty:
        finite = x != -torch.inf
        finite_x, num_finite = x.masked_fill(~finite, 0).sum(1), finite.sum(1).to(z.dtype)
    x.clamp_(min=_FLOOR)
    exp = x.exp()
    total = exp.sum(1)
    return RowSums(top, total, exp.mul_(x).sum(1), finite_x, num_finite)


def dlogits_from_scaled(
    z: Tensor, lse: Tensor, columns: Tensor, grads: RowGrads, temperature: float | Tensor, softcap: float | None
) -> Tensor:
    """Gradient of the raw logits behind z [T, V]; a target column outside [0, V) lies in another tile."""
    column = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    a = (z - lse[:, None]).clamp_(min=_FLOOR)
    dz = a.exp()
    if grads.slope is None:
        dz.mul_(grads.constant[:, None])
    else:
        dz.mul_(a.mul_(grads.slope[:, None]).add_(grads.constant[:, None]))
    if grads.onehot is not None:
        here = (columns >= 0) & (columns < z.shape[1])
        index = columns.clamp(0, z.shape[1] - 1)[:, None]
        dz.scatter_add_(1, index, grads.onehot.masked_fill(~here, 0)[:, None])
    if grads.uniform is not None:
        dz.sub_(grads.uniform[:, None].expand_as(z).masked_fill(z == -torch.inf, 0))
    if softcap is not None:
        dz.mul_(1 - (z * column / softcap).square())
    return dz.div_(column)


def take(value: float | Tensor, rows: slice) -> float | Tensor:
    """Rows of a per-row tensor; a number stays as it is."""
    return value[rows] if isinstance(value, Tensor) else value


class _TokenLogprob(torch.autograd.Function):
    """One node for all four outputs; walks blocks of rows so that temporaries stay small."""

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
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, columns, active, num_finite, logprob, entropy, lse = ctx.saved_tensors
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
        return dlogits, None, None, None, None, None, None


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
