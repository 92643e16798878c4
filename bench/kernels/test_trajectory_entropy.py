"""Entropy of trajectories from token entropies. N trajectories, L padded length, T packed tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench.harness.case import Candidate, Case, Outputs, Run, inputs_on, load
from mgrpo_kernels import trajectory_entropy

OP = "trajectory_entropy"
N, L = 64, 1_024
SMALL = (6, 37)


@dataclass(frozen=True)
class Inputs:
    """The same tokens in both layouts."""

    padded: Tensor  # [N, L]
    mask: Tensor  # [N, L]
    packed: Tensor  # [T]
    cu_seqlens: Tensor  # [N+1]
    lengths: Tensor  # [N]
    ids: Tensor  # [T], sequence of each token


def make(num: int, length: int) -> Inputs:
    """Lengths from half of L to L."""
    torch.manual_seed(0)
    lengths = torch.randint(length // 2, length + 1, (num,))
    mask = torch.arange(length) < lengths[:, None]
    padded = torch.rand(num, length) * 3
    cu_seqlens = torch.zeros(num + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    ids = torch.repeat_interleave(torch.arange(num), lengths)
    return Inputs(padded, mask, padded[mask], cu_seqlens, lengths, ids)


def run(call: Callable[[], Tensor]) -> Run:
    return Run(call=call, outputs=lambda out: {"entropy": out})


def apply(inputs: Inputs, layout: str, backend: str, dtype: torch.dtype = torch.float32) -> Tensor:
    if layout == "packed":
        return trajectory_entropy(inputs.packed.to(dtype), cu_seqlens=inputs.cu_seqlens, backend=backend)
    return trajectory_entropy(inputs.padded.to(dtype), mask=inputs.mask, backend=backend)


def ours(layout: str) -> Callable[[str], Candidate]:
    return lambda backend: Candidate(
        name=f"ours, {backend}", prepare=lambda inputs: run(lambda: apply(inputs, layout, backend))
    )


def oracle(layout: str) -> Callable[[Inputs], Outputs]:
    return lambda inputs: {"entropy": apply(inputs, layout, "reference", torch.float64)}


def masked_sums(inputs: Inputs) -> Tensor:
    return (inputs.padded * inputs.mask).sum(1) / inputs.mask.sum(1)


def verl(inputs: Inputs) -> Run:
    masked_mean = load("verl.utils.torch_functional", "masked_mean")
    return run(lambda: masked_mean(inputs.padded, inputs.mask, axis=1))


def scatter(inputs: Inputs) -> Tensor:
    return inputs.packed.new_zeros(inputs.lengths.shape[0]).index_add_(0, inputs.ids, inputs.packed) / inputs.lengths


def loop(inputs: Inputs) -> Tensor:
    return torch.stack([part.mean() for part in inputs.packed.split(inputs.lengths.tolist())])


PEERS = {
    "padded": [
        Candidate(name="torch masked sums", prepare=lambda inputs: run(lambda: masked_sums(inputs))),
        Candidate(name="verl masked_mean", package="verl", prepare=verl),
    ],
    "packed": [
        Candidate(name="torch masked sums, padded", prepare=lambda inputs: run(lambda: masked_sums(inputs))),
        Candidate(name="torch index_add_", prepare=lambda inputs: run(lambda: scatter(inputs))),
        Candidate(
            name="torch.segment_reduce",
            prepare=lambda inputs: run(lambda: torch.segment_reduce(inputs.packed, "mean", lengths=inputs.lengths)),
        ),
        Candidate(name="torch split, mean in a loop", prepare=lambda inputs: run(lambda: loop(inputs))),
    ],
}


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_trajectory_entropy(bench, device, layout, backend):
    """At most 64 k tokens, which stay in the cache."""
    with inputs_on(device):
        tokens = int(make(N, L).lengths.sum()) if layout == "packed" else N * L
    bench(
        Case(
            op=OP,
            mode=f"{layout}, mean",
            dtype="float32",
            shape=f"N={N} " + (f"T={tokens}" if layout == "packed" else f"L={L}"),
            make=lambda: make(N, L),
            make_small=lambda: make(*SMALL),
            ours=ours(layout),
            oracle=oracle(layout),
            peers=PEERS[layout],
            reduction_length=SMALL[1],
            bytes_moved=tokens * (4 if layout == "packed" else 5),
            launch_bound=True,
        ),
        backend,
    )
