"""Launch of the compiled CPU kernel: tensors to addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels._native import address, as_fp32, contiguous, library

_MODES = ("std", "mean", "leave_one_out", "sign")


def group_advantage(rewards: Tensor, keep: Tensor | None, mode: str) -> Tensor:
    """See ops.py."""
    values, keep = as_fp32(rewards), contiguous(keep)
    advantage = torch.empty(rewards.shape, dtype=torch.float32)
    library().group_advantage(
        address(values), address(keep), *rewards.shape, _MODES.index(mode), address(advantage), torch.get_num_threads()
    )
    return advantage
