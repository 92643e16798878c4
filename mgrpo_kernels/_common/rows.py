"""Shared by all backends of the token log-probs, on one number a row: sums to outputs, upstream to coefficients.

T rows, V columns, z = softcapped logits / temperature. Backward formulas, with a = z - lse and p = exp(a):
dz = dlogprob * onehot + p * (A + C * a), A = dlse - dlogprob - dentropy * entropy, C = -dentropy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo_kernels._common.checks import IGNORED_TARGET
from mgrpo_kernels._common.segments import accumulation_dtype

# exp of it is exactly 0 in fp32 and fp64: clamping there keeps exp(x) * x at 0 where x is -inf.
FLOOR = -1e4


class RowSums(NamedTuple):
    """Sums over the columns seen so far, each [T]; x = z - top."""

    top: Tensor
    exp: Tensor
    exp_x: Tensor
    finite_x: Tensor
    num_finite: Tensor

    def shift(self, top: Tensor) -> RowSums:
        """The same sums about a larger or equal `top`."""
        gap = self.top - top
        weight = gap.exp()
        exp_x = weight * (self.exp_x + self.exp * gap)
        return RowSums(top, weight * self.exp, exp_x, self.finite_x + self.num_finite * gap, self.num_finite)

    def merge(self, other: RowSums) -> RowSums:
        """Sums over the columns of both."""
        top = torch.maximum(self.top, other.top)
        left, right = self.shift(top), other.shift(top)
        return RowSums(top, *(a + b for a, b in zip(left[1:], right[1:], strict=True)))


class RowOutputs(NamedTuple):
    """The four results of every row, each [T]."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    self_certainty: Tensor


class RowGrads(NamedTuple):
    """Coefficients of a row's backward, each [T]; None for an absent term."""

    constant: Tensor
    onehot: Tensor | None
    slope: Tensor | None
    uniform: Tensor | None

    def take(self, rows: slice | Tensor) -> RowGrads:
        """The same for some of the rows."""
        terms = (None if term is None else term[rows] for term in self[1:])
        return RowGrads(self.constant[rows], *terms)


def active_rows(targets: Tensor, mask: Tensor | None) -> Tensor:
    """[T] bool, False for rows removed by the mask or the ignored target."""
    active = targets != IGNORED_TARGET
    return active if mask is None else active & mask


def row_outputs(sums: RowSums, z_target: Tensor, valid: Tensor) -> RowOutputs:
    """Results from the sums; NaN where `valid` is False."""
    log_exp = sums.exp.log()
    outputs = RowOutputs(
        (z_target - sums.top) - log_exp,
        log_exp - sums.exp_x / sums.exp,
        sums.top + log_exp,
        log_exp - sums.finite_x / sums.num_finite,
    )
    return RowOutputs(*(output.masked_fill(~valid, torch.nan) for output in outputs))


def valid_rows(targets: Tensor, temperature: float | Tensor, vocabulary: int) -> Tensor:
    """[T] bool, False where the target or the temperature is out of range."""
    valid = (targets >= 0) & (targets < vocabulary)
    return valid & (temperature > 0) & (temperature < torch.inf) if isinstance(temperature, Tensor) else valid


def row_grads(outputs: RowOutputs, num_finite: Tensor, grads: tuple[Tensor | None, ...]) -> RowGrads:
    """Per-row coefficients of the backward from the upstream gradients."""
    dlogprob, dentropy, dlse, dcertainty = grads
    constant = torch.zeros_like(outputs.lse)
    slope = uniform = None
    if dlogprob is not None:
        dlogprob = dlogprob.masked_fill(outputs.logprob == -torch.inf, 0)
        constant = constant - dlogprob
    if dentropy is not None:
        constant, slope = constant - dentropy * outputs.entropy, -dentropy
    if dlse is not None:
        constant = constant + dlse
    if dcertainty is not None:
        constant, uniform = constant + dcertainty, dcertainty / num_finite.clamp_min(1)
    return RowGrads(constant, dlogprob, slope, uniform)


def scale_logits(logits: Tensor, temperature: float | Tensor, softcap: float | None) -> Tensor:
    """Upcast first, so that neither the softcap nor the temperature rounds the logits."""
    z = logits.to(accumulation_dtype(logits))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def dlogits_from_scaled(
    z: Tensor, lse: Tensor, columns: Tensor, grads: RowGrads, temperature: float | Tensor, softcap: float | None
) -> Tensor:
    """Gradient of the raw logits behind z [T, V]; a target column outside [0, V) lies in another tile."""
    column = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    a = (z - lse[:, None]).clamp_(min=FLOOR)
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
