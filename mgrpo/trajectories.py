"""All rollouts of one step, from both sources, as one batch.

Letters: B prompts, M policy and N momentum rollouts a prompt, G = M + N, R = B * G trajectories, L response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from mgrpo.rollout.engine import Rollouts


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """Trajectory b * G + i is rollout i of prompt b; the policy's rollouts come first."""

    prompts: list[Sequence[int]]  # B prompts as token ids
    tokens: torch.Tensor  # [R, L] int64
    mask: torch.Tensor  # [R, L] bool, response tokens
    rollout_logprob: torch.Tensor  # [R, L] fp32, reported by the engine
    truncated: torch.Tensor  # [B, G] bool
    num_policy: int  # M

    @property
    def lengths(self) -> torch.Tensor:
        """[B, G] int64, response tokens."""
        return self.mask.sum(1).view(self.truncated.shape)

    @property
    def is_momentum(self) -> torch.Tensor:
        """[B, G] bool, written by the momentum model."""
        return (torch.arange(self.truncated.shape[1]) >= self.num_policy).expand(self.truncated.shape)

    def prompt(self, row: int) -> Sequence[int]:
        """Prompt of trajectory `row`."""
        return self.prompts[row // self.truncated.shape[1]]

    def response(self, row: int) -> list[int]:
        """Response of trajectory `row`, without padding."""
        return self.tokens[row, self.mask[row]].tolist()


def join(prompts: Sequence[Sequence[int]], policy: Rollouts, momentum: Rollouts | None) -> Trajectories:
    """Interleaves the two sources prompt by prompt; tensors are padded to the longer one."""
    parts = [policy] if momentum is None else [policy, momentum]
    width = max(part.tokens.shape[1] for part in parts)

    def grouped(values: list[torch.Tensor]) -> torch.Tensor:
        """[B * n, ...] of each part to [B, G, ...]."""
        views = [v.view(len(prompts), part.num_per_prompt, *v.shape[1:]) for v, part in zip(values, parts, strict=True)]
        return torch.cat(views, 1)

    def wide(values: list[torch.Tensor]) -> torch.Tensor:
        """[B * n, L] of each part to [R, L]."""
        return grouped([pad(v, (0, width - v.shape[1])) for v in values]).flatten(0, 1)

    return Trajectories(
        prompts=list(prompts),
        tokens=wide([part.tokens for part in parts]),
        mask=wide([part.mask for part in parts]),
        rollout_logprob=wide([part.logprobs for part in parts]),
        truncated=grouped([part.truncated for part in parts]),
        num_policy=policy.num_per_prompt,
    )
