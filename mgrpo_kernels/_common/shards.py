"""A vocabulary that is sharded over the processes of a group."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo_kernels._common.checks import invalid
from mgrpo_kernels._common.rows import RowSums


class Shard(NamedTuple):
    """The vocabulary range that this process holds."""

    start: int
    vocabulary: int
    group: dist.ProcessGroup | None


class LocalHead(NamedTuple):
    """This process's part of a head; `shard` is None if no placement gives it."""

    weight: Tensor
    bias: Tensor | None
    shard: Shard | None


def local_head(where: str, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None) -> LocalHead:
    """The local part of a weight that is a DTensor, and of its bias; their gradients are again DTensors."""
    if group is not None and not torch.compiler.is_compiling() and not isinstance(group, dist.ProcessGroup):
        raise invalid(where, "group", "a process group", type(group).__name__, "Pass dist.group.WORLD, say.")
    if type(weight) in (Tensor, torch.nn.Parameter):
        return LocalHead(weight, bias, None)
    # The import takes a tenth of a second, which other calls must not wait for.
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as Sharded

    if not isinstance(weight, DTensor):
        return LocalHead(weight, bias, None)
    if group is not None:
        remedy = "The placement of the weight names its group."
        raise invalid(where, "group", "None where weight is a DTensor", type(group).__name__, remedy)
    placements = weight.placements
    dims = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    # A subclass may split the rows in another order.
    if len(dims) > 1 or any(type(placements[dim]) is not Sharded or not placements[dim].is_shard(0) for dim in dims):
        remedy = "Redistribute it."
        raise invalid(where, "weight", "replicated or sharded once, on dim 0", list(placements), remedy)
    if bias is not None and (not isinstance(bias, DTensor) or bias.placements != placements):
        raise invalid(where, "bias", "a DTensor placed as weight", type(bias).__name__, "Distribute it as weight.")
    local_bias = bias.to_local() if isinstance(bias, DTensor) else None
    vocabulary, local = weight.shape[0], weight.to_local()
    if not dims:
        return LocalHead(local, local_bias, Shard(0, vocabulary, None))
    group = weight.device_mesh.get_group(dims[0])
    size = -(-vocabulary // dist.get_world_size(group))
    start = min(size * dist.get_rank(group), vocabulary)
    expected = min(start + size, vocabulary) - start
    if local.shape[0] != expected:
        remedy = "Shard it by distribute_tensor."
        raise invalid(where, "weight", f"split as by torch.chunk, {expected} rows here", local.shape[0], remedy)
    return LocalHead(local, local_bias, Shard(start, vocabulary, group))


def find_shard(columns: int, group: dist.ProcessGroup | None, device: torch.device) -> Shard:
    """Range of `columns` local columns in the whole vocabulary; shards are in rank order, of any size."""
    if group is None:
        return Shard(0, columns, None)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([columns], device=device), group=group)
    counts = torch.cat(sizes).tolist()
    return Shard(sum(counts[: dist.get_rank(group)]), sum(counts), group)


def merge_over_group(sums: RowSums, z_target: Tensor, group: dist.ProcessGroup) -> tuple[RowSums, Tensor]:
    """Sums and target logits over all shards of the vocabulary, by one collective; bit-equal on all ranks."""
    mine = torch.stack([*sums, z_target])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    whole, z_whole = RowSums(*parts[0][:5]), parts[0][5]
    for part in parts[1:]:
        whole, z_whole = whole.merge(RowSums(*part[:5])), z_whole + part[5]
    return whole, z_whole
