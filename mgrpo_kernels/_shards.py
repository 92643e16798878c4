"""A vocabulary that is spread over the processes of a group."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo_kernels._rows import RowSums


class Shard(NamedTuple):
    """The vocabulary range that this process holds."""

    start: int
    vocabulary: int
    group: dist.ProcessGroup | None


def find_shard(columns: int, group: dist.ProcessGroup | None, device: torch.device) -> Shard:
    """Where `columns` local columns lie in the whole vocabulary; shards are in rank order, of any size."""
    if group is None:
        return Shard(0, columns, None)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([columns], device=device), group=group)
    counts = torch.cat(sizes).tolist()
    return Shard(sum(counts[: dist.get_rank(group)]), sum(counts), group)


def merge_over_group(sums: RowSums, z_target: Tensor, group: dist.ProcessGroup) -> tuple[RowSums, Tensor]:
    """Sums and target logits over every shard of the vocabulary."""
    top = sums.top.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    totals = torch.stack([*sums.shift(top)[1:], z_target])
    dist.all_reduce(totals, dist.ReduceOp.SUM, group=group)
    return RowSums(top, *totals[:4]), totals[4]
