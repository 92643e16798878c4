"""Majority vote over the answers of a group. B prompts, G rollouts a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness.case import Candidate, Case, Run
from mgrpo_kernels import majority_vote

OP = "majority_vote"
B, G = 512, 32
SMALL = (9, 7)


@dataclass(frozen=True)
class Inputs:
    """Answers as ids, and as strings, which a project without ids counts."""

    answer_ids: Tensor  # [B, G]
    texts: list[list[str]]  # B lists of G


def make(num: int, group: int) -> Inputs:
    """One frequent answer a prompt, and a tail; every rollout has an answer."""
    torch.manual_seed(0)
    tail = torch.randint(0, 64, (num, group))
    answer_ids = torch.where(torch.rand(num, group) < 0.4, tail[:, :1], tail)
    return Inputs(answer_ids, [[rf"\frac{{{answer}}}{{7}}" for answer in row] for row in answer_ids.tolist()])


def run(call: Callable[[], tuple[Tensor, Tensor]]) -> Run:
    return Run(call=call, outputs=lambda out: {"label": out[0], "share": out[1]})


def ours(backend: str) -> Candidate:
    return Candidate(
        name=f"ours, {backend}",
        prepare=lambda inputs: run(lambda: majority_vote(inputs.answer_ids, backend=backend)[:2]),
    )


def count_ids(inputs: Inputs) -> tuple[Tensor, Tensor]:
    winners = [Counter(row).most_common(1)[0] for row in inputs.answer_ids.tolist()]
    labels = torch.tensor([answer for answer, _ in winners], device=inputs.answer_ids.device)
    votes = torch.tensor([votes for _, votes in winners], device=inputs.answer_ids.device)
    return labels, votes / inputs.answer_ids.shape[1]


def count_texts(inputs: Inputs) -> list[tuple[str, int]]:
    return [Counter(row).most_common(1)[0] for row in inputs.texts]


def texts(inputs: Inputs) -> Run:
    def outputs(winners: list[tuple[str, int]]) -> dict[str, Tensor]:
        labels = [int(text.split("{")[1].split("}")[0]) for text, _ in winners]
        votes = torch.tensor([votes for _, votes in winners], device=inputs.answer_ids.device)
        return {
            "label": torch.tensor(labels, device=inputs.answer_ids.device),
            "share": votes / inputs.answer_ids.shape[1],
        }

    return Run(call=lambda: count_texts(inputs), outputs=outputs)


def mode(inputs: Inputs) -> Run:
    """torch.mode takes the smallest answer of a tie, so its label is not compared."""

    def call() -> Tensor:
        label = inputs.answer_ids.mode(1).values
        return (inputs.answer_ids == label[:, None]).float().mean(1)

    return Run(call=call, outputs=lambda share: {"share": share})


PEERS = [
    Candidate(name="Counter on strings", prepare=texts),
    Candidate(name="Counter on the ids of a tensor", prepare=lambda inputs: run(lambda: count_ids(inputs))),
    Candidate(name="torch.mode, mean (another tie rule)", prepare=mode),
]


def test_majority_vote(bench, backend):
    """128 KiB of ids."""

    def oracle(inputs: Inputs) -> dict[str, Tensor]:
        label, share = count_ids(inputs)
        return {"label": label, "share": share.double()}

    bench(
        Case(
            op=OP,
            mode="no mask",
            dtype="int64",
            shape=f"B={B} G={G}",
            make=lambda: make(B, G),
            make_small=lambda: make(*SMALL),
            ours=ours,
            oracle=oracle,
            peers=PEERS,
            reduction_length=SMALL[1],
            bytes_moved=B * (G * 12 + 17),
            launch_bound=True,
        ),
        backend,
    )
