"""Advantage within a group of rollouts. B prompts, G rollouts a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.harness.case import Candidate, Case, Run, load
from mgrpo_kernels import group_advantage

OP = "group_advantage"
B, G = 512, 16
SMALL = (7, 5)


@dataclass(frozen=True)
class Inputs:
    """Rewards in our form, and in verl's: a token column, a mask and the group of each row."""

    rewards: Tensor  # [B, G]
    column: Tensor  # [B * G, 1]
    mask: Tensor  # [B * G, 1]
    index: Any  # [B * G] numpy


def make(num: int, group: int) -> Inputs:
    """Rewards of 0 and 1."""
    torch.manual_seed(0)
    rewards = (torch.rand(num, group) < 0.4).float()
    index = torch.arange(num, device="cpu").repeat_interleave(group).numpy()
    return Inputs(rewards, rewards.reshape(-1, 1), torch.ones(num * group, 1), index)


def run(inputs: Inputs, call: Callable[[], Tensor]) -> Run:
    return Run(call=call, outputs=lambda out: {"advantage": out.reshape(inputs.rewards.shape)})


def ours(backend: str) -> Candidate:
    return Candidate(
        name=f"ours, {backend}",
        prepare=lambda inputs: run(inputs, lambda: group_advantage(inputs.rewards, backend=backend)),
    )


def verl(name: str) -> Callable[[Inputs], Run]:
    def prepare(inputs: Inputs) -> Run:
        function = load("verl.trainer.ppo.core_algos", name)
        return run(inputs, lambda: function(inputs.column, inputs.mask, inputs.index)[0])

    return prepare


def eager(inputs: Inputs) -> Tensor:
    rewards = inputs.rewards
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)


PEERS = [
    Candidate(
        name="verl compute_grpo_outcome_advantage", package="verl", prepare=verl("compute_grpo_outcome_advantage")
    ),
    Candidate(
        name="verl compute_grpo_vectorized_outcome_advantage",
        package="verl",
        prepare=verl("compute_grpo_vectorized_outcome_advantage"),
    ),
    Candidate(name="torch mean, std", prepare=lambda inputs: run(inputs, lambda: eager(inputs))),
]


def test_group_advantage(bench, backend):
    """32 KiB in, 32 KiB out."""
    bench(
        Case(
            op=OP,
            mode="std",
            dtype="float32",
            shape=f"B={B} G={G}",
            make=lambda: make(B, G),
            make_small=lambda: make(*SMALL),
            ours=ours,
            oracle=lambda inputs: {"advantage": group_advantage(inputs.rewards.double(), backend="reference")},
            peers=PEERS,
            reduction_length=SMALL[1],
            bytes_moved=2 * 4 * B * G,
            launch_bound=True,
        ),
        backend,
    )
