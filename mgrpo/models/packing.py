"""Micro-batches: which trajectories go through one forward pass, and how their tokens lie in it.

Letters: R trajectories, r of them in a micro-batch, S its longest sequence, T its response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from mgrpo.types import TrajectoryBatch


class PackedBatch(NamedTuple):
    """The input of one forward pass. Its response tokens come trajectory by trajectory."""

    ids: torch.Tensor  # [r, S] int64, prompt and response, padded on the right
    line: torch.Tensor  # [T] int64, the sequence of each response token
    column: torch.Tensor  # [T] int64, the position that predicts it, one before its own
    targets: torch.Tensor  # [T] int64, the response tokens
    rows: torch.Tensor  # [r] int64, index of each sequence among the R trajectories

    def to(self, device: torch.device) -> PackedBatch:
        """The same on a device."""
        return PackedBatch(*(values.to(device) for values in self))


def pack(trajectories: TrajectoryBatch, rows: torch.Tensor, *, pad_id: int) -> PackedBatch:
    """Trajectories `rows` [r] as one input."""
    prompts = [trajectories.prompt(row) for row in rows.tolist()]
    responses = [trajectories.response(row) for row in rows.tolist()]
    sequences = [torch.tensor([*p, *r]) for p, r in zip(prompts, responses, strict=True)]
    # Right padding comes after every real token, so causal attention alone keeps it out.
    ids = pad_sequence(sequences, batch_first=True, padding_value=pad_id)
    sizes = torch.tensor([len(r) for r in responses])
    line = torch.repeat_interleave(torch.arange(len(responses)), sizes)
    before = torch.tensor([len(p) - 1 for p in prompts])[line]
    column = before + torch.arange(len(line)) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    return PackedBatch(ids, line, column, ids[line, column + 1], rows)


def micro_batches(
    trajectories: TrajectoryBatch, rows: torch.Tensor, *, budget: int, pad_id: int
) -> Iterator[PackedBatch]:
    """Splits trajectories `rows` into inputs of similar length, of at most `budget` padded tokens or of one row."""
    lengths = {row: len(trajectories.prompt(row)) + int(trajectories.mask[row].sum()) for row in rows.tolist()}
    group: list[int] = []
    for row in sorted(lengths, key=lambda row: (lengths[row], row)):
        if group and (len(group) + 1) * lengths[row] > budget:
            yield pack(trajectories, torch.tensor(group), pad_id=pad_id)
            group = []
        group.append(row)
    if group:
        yield pack(trajectories, torch.tensor(group), pad_id=pad_id)
