"""Interquartile filter on trajectory entropy. B prompts, G rollouts a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench.harness.case import Candidate, Case, Run
from mgrpo_kernels import IqrFilter, iqr_filter

OP = "iqr_filter"
B, G = 512, 32
SMALL = (9, 7)
K = 0.75
Filtered = tuple[Tensor, Tensor, Tensor] | IqrFilter


@dataclass(frozen=True)
class Inputs:
    """Inputs of every candidate."""

    entropy: Tensor  # [B, G]


def make(num: int, group: int) -> Inputs:
    """Entropies with a low tail to drop."""
    torch.manual_seed(0)
    return Inputs(torch.rand(num, group).sqrt() * 2)


def run(call: Callable[[], Filtered]) -> Run:
    return Run(call=call, outputs=lambda out: dict(zip(("keep", "q1", "q3"), out, strict=True)))


def ours(scope: str) -> Callable[[str], Candidate]:
    return lambda backend: Candidate(
        name=f"ours, {backend}",
        prepare=lambda inputs: run(lambda: iqr_filter(inputs.entropy, k=K, scope=scope, backend=backend)),
    )


def loop(inputs: Inputs) -> Filtered:
    """A prompt at a time."""
    parts = []
    for row in inputs.entropy:
        q1, q3 = torch.quantile(row, 0.25), torch.quantile(row, 0.75)
        parts.append((row >= q1 - K * (q3 - q1), q1, q3))
    keep, q1, q3 = (torch.stack(part) for part in zip(*parts, strict=True))
    return keep, q1, q3


def vectorized(inputs: Inputs) -> Filtered:
    q1, q3 = torch.quantile(inputs.entropy, inputs.entropy.new_tensor([0.25, 0.75]), dim=1)
    return inputs.entropy >= (q1 - K * (q3 - q1))[:, None], q1, q3


def whole(inputs: Inputs) -> Filtered:
    q1, q3 = torch.quantile(inputs.entropy, 0.25), torch.quantile(inputs.entropy, 0.75)
    return inputs.entropy >= q1 - K * (q3 - q1), q1, q3


PEERS = {
    "prompt": [
        Candidate(name="torch.quantile, prompt by prompt", prepare=lambda inputs: run(lambda: loop(inputs))),
        Candidate(name="torch.quantile, dim=1", prepare=lambda inputs: run(lambda: vectorized(inputs))),
    ],
    "batch": [Candidate(name="torch.quantile", prepare=lambda inputs: run(lambda: whole(inputs)))],
}


@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_iqr_filter(bench, scope, backend):
    """64 KiB of entropies."""

    def oracle(inputs: Inputs) -> dict[str, Tensor]:
        # The mask compares fp32 numbers: an fp64 quartile would flip entries on the fence.
        keep, q1, q3 = loop(inputs) if scope == "prompt" else whole(inputs)
        return {"keep": keep, "q1": q1.double(), "q3": q3.double()}

    bench(
        Case(
            op=OP,
            mode=f"scope {scope}",
            dtype="float32",
            shape=f"B={B} G={G}",
            make=lambda: make(B, G),
            make_small=lambda: make(*SMALL),
            ours=ours(scope),
            oracle=oracle,
            peers=PEERS[scope],
            reduction_length=1,
            bytes_moved=B * G * 5,
            launch_bound=True,
        ),
        backend,
    )
