"""Micro-batches: the trajectories of one forward pass and the layout of their tokens.

Padded, each sequence has a row. Packed, all of them lie one behind the other in one row, and positions that start again
at 0 keep attention within each: no padding is computed, but each attention implementation has to know them.
Letters: R trajectories, r of them in a micro-batch, S its longest sequence, N its tokens, T its response tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from mgrpo.errors import ConfigError
from mgrpo.models.load import num_embeddings
from mgrpo.models.plain import accepted, plain_logits
from mgrpo.types import TrajectoryBatch

# These find the boundaries of packed sequences from positions; others are given the boundaries too.
_READS_POSITIONS = ("eager", "sdpa")
# Of the spread of the logits: sums in another order differ by 1e-6, in bf16 by up to 0.007, a token of a neighbour by
# 0.1 and more.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.02}
_TRIAL_LENGTHS = (7, 12, 1, 5)


class PackedBatch(NamedTuple):
    """The input of one forward pass; response tokens are in order of the trajectories."""

    ids: torch.Tensor  # int64, prompt and response: [r, S] padded on the right, or [1, N]
    line: torch.Tensor  # [T] int64, the row of `ids` with each response token
    column: torch.Tensor  # [T] int64, the position in it that predicts the token, one before its own
    targets: torch.Tensor  # [T] int64, the response tokens
    rows: torch.Tensor  # [r] int64, index of each sequence among the R trajectories
    lengths: torch.Tensor | None = None  # [r] int64, of the sequences of a packed row; None where they are padded

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on a device."""
        return PackedBatch(*(None if values is None else values.to(device) for values in self))  # pyright: ignore

    def options(self, model: PreTrainedModel) -> dict[str, Any]:
        """Arguments of a forward pass that keep packed sequences apart; never a mask, which would join them."""
        return {} if self.lengths is None else boundaries(model, self.lengths)


def boundaries(model: PreTrainedModel, lengths: torch.Tensor) -> dict[str, Any]:
    """Positions of packed sequences of `lengths` [r], and their boundaries for a varlen attention kernel."""
    ends = lengths.cumsum(0)
    positions = torch.arange(int(ends[-1]), device=lengths.device) - torch.repeat_interleave(ends - lengths, lengths)
    options: dict[str, Any] = {"position_ids": positions[None]}
    if model.config._attn_implementation in _READS_POSITIONS:
        return options
    bounds = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    longest = int(lengths.max())
    return options | {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def pack(trajectories: TrajectoryBatch, rows: torch.Tensor, *, pad_id: int, packed: bool = False) -> PackedBatch:
    """Trajectories `rows` [r] as one input."""
    prompts = [trajectories.prompt(row) for row in rows.tolist()]
    responses = [trajectories.response(row) for row in rows.tolist()]
    sequences = [torch.tensor([*p, *r]) for p, r in zip(prompts, responses, strict=True)]
    sizes = torch.tensor([len(r) for r in responses])
    first = torch.tensor([len(p) - 1 for p in prompts])  # the column that predicts a response's first token
    line = torch.repeat_interleave(torch.arange(len(responses)), sizes)
    offset = torch.arange(len(line)) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    if not packed:
        # Right padding comes after every real token, so causal attention alone keeps it out.
        ids, column = pad_sequence(sequences, batch_first=True, padding_value=pad_id), first[line] + offset
        return PackedBatch(ids, line, column, ids[line, column + 1], rows)
    ids, lengths = torch.cat(sequences)[None], torch.tensor([len(sequence) for sequence in sequences])
    column = (lengths.cumsum(0) - lengths + first)[line] + offset
    return PackedBatch(ids, torch.zeros_like(line), column, ids[0, column + 1], rows, lengths)


def groups(
    trajectories: TrajectoryBatch, rows: torch.Tensor, *, budget: int, packed: bool = False, lanes: int = 1
) -> list[list[int]]:
    """Splits trajectories `rows` into forward passes of similar length, of `budget` tokens with padding, or of one row.

    With `lanes`, the number of groups is a multiple of it: those with the most tokens are split, and where only single
    rows are left the last groups are empty. Costly groups come first, so that those computed together are alike.
    """
    chosen, responses = rows.tolist(), trajectories.mask[rows].sum(1).tolist()
    lengths = {row: len(trajectories.prompt(row)) + count for row, count in zip(chosen, responses, strict=True)}
    found: list[list[int]] = []
    tokens = 0
    for row in sorted(lengths, key=lambda row: (lengths[row], row)):
        tokens = tokens + lengths[row] if packed else (len(found[-1]) + 1 if found else 1) * lengths[row]
        if not found or tokens > budget:
            found.append([])
            tokens = lengths[row]
        found[-1].append(row)
    if lanes == 1 or not found:
        return found

    def cost(group: list[int]) -> tuple[int, int]:
        return sum(lengths[row] for row in group) if packed else len(group) * lengths[group[-1]], len(group)

    while len(found) % lanes:
        splittable = [group for group in found if len(group) > 1]
        if not splittable:
            break
        largest = max(splittable, key=cost)
        found.remove(largest)
        found += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    found.sort(key=lambda group: (cost(group), group), reverse=True)
    return found + [[] for _ in range(-len(found) % lanes)]


@torch.no_grad()
def require_packing(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
    """Raises ConfigError for a model that does not keep packed sequences apart, as a trial in `dtype` shows."""
    name, attention = type(model).__name__, model.config._attn_implementation
    vocabulary, device = num_embeddings(model), next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(_TRIAL_LENGTHS, device=device)
    gap = float("inf")
    if vocabulary and "position_ids" in accepted(model):
        sequences = [torch.randint(vocabulary, (n,), generator=generator).to(device) for n in _TRIAL_LENGTHS]
        packed = plain_logits(model, torch.cat(sequences)[None], **boundaries(model, lengths))[0].float()
        alone = torch.cat([plain_logits(model, ids[None])[0].float() for ids in sequences])
        gap = float((packed - alone).norm() / (alone - alone.mean(-1, keepdim=True)).norm().clamp_min(1e-30))
    if not gap <= _TOLERANCE[dtype]:
        raise ConfigError(
            [
                f"config: --optim.packing packed needs a model that keeps packed sequences apart, {name} with "
                f"attention {attention} mixes them (its logits differ by {gap:.2g} of their spread). Take padded."
            ]
        )
