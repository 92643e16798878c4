"""Launch of the compiled kernel: tensors to addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels._common.native import address, as_fp32, contiguous, native

_MODES = ("std", "mean", "leave_one_out", "sign")


def group_advantage(rewards: Tensor, keep: Tensor | None, mode: str) -> Tensor:
    """See ops.py."""
    values, keep = as_fp32(rewards), contiguous(keep)
    advantage = rewards.new_empty(rewards.shape, dtype=torch.float32)
    library, executor = native(rewards)
    library.group_advantage(
        address(values), address(keep), *rewards.shape, _MODES.index(mode), address(advantage), executor
    )
    return advantage
