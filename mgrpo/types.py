"""Data that the stages of a step pass to one another.

Letters: B prompts, M policy and N momentum rollouts a prompt, G = M + N, n rollouts of one source a prompt,
R = B * G trajectories, L longest response in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.functional import pad

Source = Literal["policy", "momentum"]
Metrics = dict[str, Any]
"""Metrics of a step by name; None if one does not apply."""


class WeightTag(NamedTuple):
    """The source of weights, and their version: the number of optimiser steps."""

    source: Source
    version: int

    def __str__(self) -> str:
        return f"{self.source}@{self.version}"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of sampling. A draw depends only on `seed` and the indices of prompt, rollout and token.

    `temperature` 0 is greedy.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0
    indices: tuple[int, ...] | None = None
    """Indices of the prompts of a call in the whole batch, where the call has a part of it; 0 to B - 1 by default."""

    def index(self, b: int) -> int:
        """Index in the whole batch of prompt b of a call."""
        return b if self.indices is None else self.indices[b]


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """n rollouts of each of B prompts from one source; row b * n + i is rollout i of prompt b."""

    tokens: torch.Tensor  # [B * n, L] int64, padded on the right
    lengths: torch.Tensor  # [B * n] int64, EOS or the token that completes a stop text included
    logprobs: torch.Tensor  # [B * n, L] fp32 behaviour log-probs after temperature, 0 at padding
    truncated: torch.Tensor  # [B * n] bool, cut at max_new_tokens without either
    num_per_prompt: int  # n
    tag: WeightTag  # weights that generated them

    @property
    def mask(self) -> torch.Tensor:
        """[B * n, L] bool, True at response tokens."""
        return torch.arange(self.tokens.shape[1])[None] < self.lengths[:, None]

    def response(self, row: int) -> list[int]:
        """Token ids of one rollout, without padding."""
        return self.tokens[row, : int(self.lengths[row])].tolist()


@dataclass(frozen=True, kw_only=True)
class TrajectoryBatch:
    """Rollouts of both models; trajectory b * G + i is rollout i of prompt b, the policy's first."""

    prompts: list[Sequence[int]]  # B prompts as token ids
    tokens: torch.Tensor  # [R, L] int64
    mask: torch.Tensor  # [R, L] bool, response tokens
    rollout_logprob: torch.Tensor  # [R, L] fp32, reported by the engine
    truncated: torch.Tensor  # [B, G] bool
    num_policy: int  # M
    version: int = 0  # of the policy weights that generated them

    @property
    def lengths(self) -> torch.Tensor:
        """[B, G] int64, number of response tokens."""
        return self.mask.sum(1).view(self.truncated.shape)

    @property
    def is_momentum(self) -> torch.Tensor:
        """[B, G] bool, True for rollouts of the momentum model."""
        return (torch.arange(self.truncated.shape[1]) >= self.num_policy).expand(self.truncated.shape)

    @property
    def by_policy(self) -> torch.Tensor:
        """[R, L] bool, response tokens of policy rollouts."""
        return self.mask & ~self.is_momentum.flatten()[:, None]

    def prompt(self, row: int) -> Sequence[int]:
        """Prompt of trajectory `row`."""
        return self.prompts[row // self.truncated.shape[1]]

    def response(self, row: int) -> list[int]:
        """Response of trajectory `row`, without padding."""
        return self.tokens[row, self.mask[row]].tolist()


def join(prompts: Sequence[Sequence[int]], policy: Rollouts, momentum: Rollouts | None) -> TrajectoryBatch:
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

    return TrajectoryBatch(
        prompts=list(prompts),
        tokens=wide([part.tokens for part in parts]),
        mask=wide([part.mask for part in parts]),
        rollout_logprob=wide([part.logprobs for part in parts]),
        truncated=grouped([part.truncated for part in parts]),
        num_policy=policy.num_per_prompt,
        version=policy.tag.version,
    )
