"""Launch of the compiled kernel, with columns of addresses, sizes and dtype codes, one entry a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from mgrpo_kernels._common.native import DTYPES, address, code, native

_CODES = {dtype: code(dtype) for dtype in DTYPES}


def _codes(tensors: Sequence[Tensor]) -> list[int]:
    """Codes of the dtypes."""
    return list(map(_CODES.__getitem__, map(attrgetter("dtype"), tensors)))


def _spread(values: Sequence[int], indices: Sequence[int], length: int) -> list[int]:
    """The values at their indices, 0 elsewhere."""
    column = [0] * length
    for index, value in zip(indices, values, strict=True):
        column[index] = value
    return column


def ema_update_(
    momentum: Sequence[Tensor],
    policy: Sequence[Tensor],
    compensation: Sequence[Tensor],
    compensated: Sequence[int],
    publish: Sequence[Tensor],
    published: Sequence[int],
    decay: float,
    decay_tensor: Tensor | None,
    stochastic: bool,
    seed: int,
    step: int,
    step_tensor: Tensor | None,
    offsets: Sequence[int],
) -> None:
    """See ops.py."""
    # The share of the policy, taken in fp64; an invalid one makes the momentum NaN.
    weight = 1.0 - decay if 0.0 <= decay <= 1.0 else math.nan
    if decay_tensor is not None:
        decay_tensor = decay_tensor.to(torch.float64)
    if step_tensor is not None:
        step_tensor = step_tensor.to(torch.int64)
    num = len(momentum)
    library, executor = native(momentum[0])
    library.ema_update(
        list(map(Tensor.data_ptr, momentum)),
        list(map(Tensor.data_ptr, policy)),
        _spread(list(map(Tensor.data_ptr, compensation)), compensated, num),
        _spread(list(map(Tensor.data_ptr, publish)), published, num),
        list(map(Tensor.numel, momentum)),
        _codes(momentum),
        _codes(policy),
        _spread(_codes(publish), published, num),
        weight,
        address(decay_tensor),
        stochastic,
        seed & (2**64 - 1),
        step & (2**32 - 1),
        address(step_tensor),
        executor,
        *([list(offsets)] if offsets else []),
    )
    torch.autograd.graph.increment_version([*momentum, *compensation, *publish])
