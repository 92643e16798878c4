"""Group advantages."""

from __future__ import annotations

import torch

import mgrpo_kernels as K
from mgrpo.config import ObjectiveConfig


def group_advantage(
    rewards: torch.Tensor,
    keep: torch.Tensor,
    trains: torch.Tensor,
    config: ObjectiveConfig,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Advantage of each rollout in the loss, within its group.

    Args:
        rewards: [B, G] fp32.
        keep: [B, G] bool, survivors of the filter.
        trains: [B, G] bool, survivors in the loss.
        config: mode, and whether mean and deviation are over the rollouts in the loss or over all survivors.
        backend: backend of mgrpo_kernels.

    Returns:
        [B, G] fp32; 0 where `trains` is False.
    """
    counted = keep if config.advantage_over == "all" else trains
    advantage = K.group_advantage(rewards, keep=counted, mode=config.advantage.replace("-", "_"), backend=backend)
    return advantage * trains
