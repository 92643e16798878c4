"""Advantage of each rollout within its group: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels._common.segments import accumulation_dtype

_EPS = 1e-6


def group_advantage(rewards: Tensor, *, keep: Tensor | None, mode: str) -> Tensor:
    """See the public function."""
    values = rewards.to(accumulation_dtype(rewards))
    if keep is None:
        keep = torch.ones_like(values, dtype=torch.bool)
    count = keep.sum(1, keepdim=True)
    others = (count - 1).clamp_min(1)
    values = torch.where(keep, values, 0)
    centred = torch.where(keep, values - values.sum(1, keepdim=True) / count.clamp_min(1), 0)
    if mode == "std":
        advantage = centred / ((centred.square().sum(1, keepdim=True) / others).sqrt() + _EPS)
    elif mode == "mean":
        advantage = centred
    elif mode == "leave_one_out":
        advantage = centred * count / others
    else:
        advantage = 2 * values - 1
    lowest = values.masked_fill(~keep, torch.inf).amin(1, keepdim=True)
    highest = values.masked_fill(~keep, -torch.inf).amax(1, keepdim=True)
    return torch.where(keep & (count > 1) & (lowest != highest), advantage, 0)
