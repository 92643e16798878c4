"""Launch of the compiled CPU kernel: columns of addresses, sizes and dtype codes, one entry a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from mgrpo_kernels._native import DTYPES, code, library

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
) -> None:
    """See ops.py."""
    kept = decay if decay_tensor is None else float(decay_tensor)
    draw = step if step_tensor is None else int(step_tensor)
    num = len(momentum)
    library().ema_update(
        list(map(Tensor.data_ptr, momentum)),
        list(map(Tensor.data_ptr, policy)),
        _spread(list(map(Tensor.data_ptr, compensation)), compensated, num),
        _spread(list(map(Tensor.data_ptr, publish)), published, num),
        list(map(Tensor.numel, momentum)),
        _codes(momentum),
        _codes(policy),
        _spread(_codes(publish), published, num),
        1.0 - kept if 0.0 <= kept <= 1.0 else math.nan,
        stochastic,
        seed & (2**64 - 1),
        draw & (2**32 - 1),
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version([*momentum, *compensation, *publish])
