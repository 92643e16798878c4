"""verl's advantage estimator `mgrpo`: group advantages over the rollouts that a mask keeps.

Letters: R rows (trajectories), L padded response tokens, B prompts, G rows of the largest group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from verl.trainer.ppo.core_algos import register_adv_est  # pyright: ignore[reportMissingImports]

import mgrpo_kernels as K
from mgrpo.integrations.verl.groups import places_in_groups


@register_adv_est("mgrpo")
def group_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Any = None,
    index: Sequence[Any] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A_i = (r_i - mean) / (std + 1e-6) over the rows of a prompt that have a response token, at every such token.

    Usable by itself with `algorithm.adv_estimator=mgrpo` and any rewards; groups may differ in size.

    Args:
        token_level_rewards: [R, L] float; r_i is their sum.
        response_mask: [R, L]; a row of zeros is not part of its group and gets 0.
        config: verl's algorithm section. norm_adv_by_std_in_grpo False omits the division (Dr. GRPO).
        index: [R], the prompt of each row.

    Returns:
        Advantages and returns, the same [R, L] fp32.

    Raises:
        ValueError: the index is missing.

    Source: arXiv 2402.03300; survivors of the filter alone as in arXiv 2512.13070.
    """
    if index is None:
        raise ValueError("mgrpo: index must name the prompt of each row, got None. Pass data with a uid.")
    by_std = True if config is None else _get(config, "norm_adv_by_std_in_grpo", True)
    with torch.no_grad():
        mask = response_mask.bool()
        rewards = (token_level_rewards.float() * mask).sum(1)
        prompt, place = places_in_groups(list(index))
        shape = (int(prompt.max()) + 1, int(place.max()) + 1)
        table, keep = rewards.new_zeros(shape), torch.zeros(shape, dtype=torch.bool, device=rewards.device)
        table[prompt, place] = rewards
        keep[prompt, place] = mask.any(1)
        advantage = K.group_advantage(table, keep=keep, mode="std" if by_std else "mean")
        advantages = advantage[prompt, place][:, None] * mask
    return advantages, advantages


def _get(config: Any, name: str, default: Any) -> Any:
    """A value of a mapping, of an omegaconf node or of a dataclass."""
    if isinstance(config, Mapping):
        return config.get(name, default)
    return getattr(config, name, default)
