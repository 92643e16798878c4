"""The weights of a sharded model as whole tensors, gathered in buckets.

Letters: W ranks among which a tensor's rows are divided.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mgrpo.distributed.sharding import local, num_shards, rows_of_rank
from mgrpo.distributed.world import ALONE, World
from mgrpo.errors import PeerError

BUCKET_BYTES = 512 * 2**20
# Every tensor of a bucket starts at a multiple of it, so that its bytes can be viewed in any dtype.
ALIGNMENT = 16

gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13


@dataclass(frozen=True)
class Part:
    """A tensor of a bucket; what is not sharded takes no bytes there."""

    names: Sequence[str]  # several if it is tied
    tensor: torch.Tensor  # or one like it, of which shape and sharding are used
    dtype: torch.dtype  # to be sent in
    start: int  # byte in each rank's part of the bucket
    end: int


class LazyWeights(Mapping[str, torch.Tensor]):
    """A state dict whose tensors are computed when they are read, where they are sharded by all ranks in one order."""

    @abstractmethod
    def like(self, key: str) -> torch.Tensor:
        """A tensor of the shape and the sharding of that which would be computed."""


def like(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A tensor of the shape and the sharding of one of a state dict, without computing it."""
    return tensors.like(name) if isinstance(tensors, LazyWeights) else tensors[name]


class WeightStream:
    """Name and whole tensor of every entry of a state dict, one after the other.

    Every rank enters it and either iterates or leaves the block at once, which takes part in the gathers all the same:

        with WeightStream(weights, world) as whole:
            for name, tensor in whole: ...

    Shards are gathered a bucket at a time, into one buffer. The tensors are copies of their own, which the consumer may
    keep; beside its shards a rank holds the buffer and one of them. Before each bucket all ranks agree that none has
    failed, so that none is more than a bucket ahead of the slowest consumer. An exception in one rank's block ends the
    stream on all, so what may fail on one rank alone belongs into the block. Tensors that are not sharded are yielded
    as they are.

    Args:
        tensors: a state dict, sharded by rows or not; all ranks have the same names and shapes.
        world: of the run.
        dtype: sharded floating-point tensors are cast to it before they are sent. None keeps theirs.
        bucket_bytes: most of a bucket, of all ranks together; a larger tensor is a bucket of its own.

    Raises:
        PeerError: on entering the next bucket or leaving, another rank has failed.

    Attributes:
        names: in the order of iteration: that of the state dict, but the names of a tied weight, which is sent once,
            follow each other.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        world: World = ALONE,
        *,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ):
        self.tensors, self.world, self.dtype = tensors, world, dtype
        self.names, self._buckets = list(tensors), list[list[Part]]()
        if world.size > 1:
            self._buckets = self._plan(bucket_bytes)
            self.names = [name for bucket in self._buckets for part in bucket for name in part.names]
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._next = 0  # bucket
        self._ended = False

    def __enter__(self) -> WeightStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            while self._next_bucket() is not None:
                pass
        elif not self._ended:
            self._agree(failed=True)
        self._buffer = self._buffer.new_empty(0)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.world.size == 1:  # a tensor may be made when it is read
            yield from ((name, self.tensors[name].detach()) for name in self.names)
        while (bucket := self._next_bucket()) is not None:
            for part in bucket:
                tensor = self._whole(part)
                for name in part.names:
                    yield name, tensor
                del tensor

    def _next_bucket(self) -> list[Part] | None:
        """Gathers the next bucket into the buffer, which the one before is lost from; None after the last."""
        if self._ended:
            return None
        self._agree()
        if self._next == len(self._buckets):
            self._ended = True
            return None
        bucket = self._buckets[self._next]
        self._next += 1
        if sharded := [part for part in bucket if part.end > part.start]:
            self._gather(sharded)
        return bucket

    def _agree(self, *, failed: bool = False) -> None:
        """Waits for all ranks; raises PeerError if another has failed."""
        self._ended, ended = True, self._ended  # also if a rank is lost
        if self.world.any(failed):
            if not failed:
                raise PeerError("update_weights: another process of the run has failed while weights were sent.")
            return
        self._ended = ended

    def _plan(self, bucket_bytes: int) -> list[list[Part]]:
        """The buckets, the same on all ranks."""
        tied: dict[tuple[object, ...], list[str]] = {}
        kept: list[tuple[list[str], torch.Tensor]] = []
        for name in self.tensors:
            tensor = like(self.tensors, name)
            # A state dict has another object under every name of a tied weight. An empty shard has no address.
            storage = local(tensor).untyped_storage()
            key = (
                (storage._cdata, local(tensor).storage_offset(), tensor.shape)
                if isinstance(tensor, DTensor)
                else (name,)
            )
            names = tied.setdefault(key, [])
            if not names:
                kept.append((names, tensor))
            names.append(name)
        buckets: list[list[Part]] = [[]]
        position = 0
        for names, tensor in kept:
            size, dtype = 0, tensor.dtype
            if isinstance(tensor, DTensor):
                dtype = self.dtype if self.dtype and dtype.is_floating_point else dtype
                row_bytes = math.prod(tensor.shape[1:]) * dtype.itemsize
                size = -(-rows_of_rank(tensor) * row_bytes // ALIGNMENT) * ALIGNMENT
                if position and (position + size) * num_shards(tensor) > bucket_bytes:
                    buckets.append([])
                    position = 0
            buckets[-1].append(Part(names, tensor, dtype, position, position + size))
            position += size
        return buckets

    @torch.no_grad()
    def _gather(self, bucket: list[Part]) -> None:
        """Fills the buffer, [W, bytes of a rank], on the device of the mesh."""
        first = bucket[0].tensor
        assert isinstance(first, DTensor)
        mesh, ranks, size = first.device_mesh, num_shards(first), bucket[-1].end
        if not self._buffer.numel():
            ends = [parts[-1].end for parts in self._buckets]
            device = torch.device(mesh.device_type)
            self._buffer = torch.empty(ranks * max(ends), dtype=torch.uint8, device=device)
        flat = self._buffer[: ranks * size]
        own = flat.view(ranks, size)[mesh.get_local_rank(mesh.ndim - 1)]
        for part in bucket:
            shard = local(self.tensors[part.names[0]].detach())
            own[part.start :].narrow(0, 0, shard.numel() * part.dtype.itemsize).view(part.dtype).copy_(shard.flatten())
        self._ended = True  # if a rank is lost
        gather_flat(flat, own, group=mesh.get_group(mesh.ndim - 1))
        self._ended = False

    def _whole(self, part: Part) -> torch.Tensor:
        """A tensor of the bucket in the buffer, in memory of its own."""
        if part.end == part.start:
            return self.tensors[part.names[0]].detach()
        assert isinstance(part.tensor, DTensor)
        ranks, size, rows = num_shards(part.tensor), self._buckets[self._next - 1][-1].end, rows_of_rank(part.tensor)
        row_bytes = math.prod(part.tensor.shape[1:]) * part.dtype.itemsize
        shards = []
        for rank, row in enumerate(self._buffer[: ranks * size].view(ranks, size)):
            count = min(rows, max(len(part.tensor) - rank * rows, 0))
            shards.append(row[part.start : part.start + count * row_bytes].view(part.dtype))
        return torch.cat(shards).view(part.tensor.shape)
