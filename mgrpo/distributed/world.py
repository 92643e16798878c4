"""The processes of a run: rank of this one, and how they agree, share data and end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mgrpo.config.distributed import world_problems
from mgrpo.distributed.environment import local_size, number
from mgrpo.errors import ConfigError


@dataclass(frozen=True)
class World:
    """The processes of a run, and the place of this one.

    The methods are collective: every rank calls them, in the same order. A world of one has no process group, and they
    return what they are given. Nothing is pickled. Each raises RuntimeError if a rank ends or is late by the timeout.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this process among those of its machine."""
    local_size: int = 1
    """Processes on this machine."""
    replicate: int = 1
    """R, copies of the sharded state; each is dealt to size / R ranks."""
    mesh: DeviceMesh | None = None
    """Of shape (size,), named shard, or (R, size / R), named replicate and shard; None in a world of one."""
    control: dist.ProcessGroup | None = None
    """Group on gloo for decisions, beside the default group, which moves tensors."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which decides, writes and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        found = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.control)
        return bool(found.item())

    def broadcast(self, value: Any) -> Any:
        """The JSON value of rank 0, on every rank; those of others are ignored."""
        if self.size == 1:
            return value
        content = _as_bytes(value) if self.is_first else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([content.numel()])
        dist.broadcast(length, 0, group=self.control)
        if not self.is_first:
            content = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(content, 0, group=self.control)
        return _as_json(content)

    def gather_json(self, value: Any) -> list[Any]:
        """The JSON value of every rank in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        content = _as_bytes(value)
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([content.numel()]), group=self.control)
        padded = torch.zeros(max(map(int, lengths)), dtype=torch.uint8)
        padded[: content.numel()] = content
        rows = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(rows, padded, group=self.control)
        return [_as_json(row[: int(length)]) for row, length in zip(rows, lengths, strict=True)]

    def broadcast_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrites tensors, of the same shapes and dtypes on every rank, with those of rank 0."""
        if self.size == 1:
            return
        for tensor in tensors:
            flat = tensor.detach().contiguous()
            dist.broadcast(flat, 0)
            if flat.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(flat)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces a contiguous tensor by its sum over ranks; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Waits until every rank is here; rank 0's error names a rank that is not."""
        if self.size > 1:
            dist.monitored_barrier(self.control)

    def close(self) -> None:
        """Ends the process groups."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


ALONE = World()
"""A run of one process."""


def find_world() -> World:
    """The world from the environment variables of torchrun and other launchers, without groups; one without them."""
    return World(number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0), local_size())


def join_world(device_type: str, *, replicate: int = 1, timeout_s: float = 1800.0) -> World:
    """Meets the other processes that the launcher has started, and makes the process groups.

    Args:
        device_type: "cpu", whose tensors travel by gloo, or "cuda", by NCCL; then each process takes the GPU of its
            local rank as its current device.
        replicate: R, must divide the number of processes.
        timeout_s: seconds after which a wait for another process is an error.

    Raises:
        ConfigError: R does not divide the number of processes.
    """
    world = find_world()
    if problems := world_problems(world.size, replicate=replicate):
        raise ConfigError(problems)
    if world.size == 1:
        return world
    timeout, shards = timedelta(seconds=timeout_s), world.size // replicate
    if device_type == "cuda":
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup)  # every rank is a member
    if replicate > 1:
        mesh = init_device_mesh(device_type, (replicate, shards), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device_type, (shards,), mesh_dim_names=("shard",))
    return World(world.rank, world.size, world.local_rank, world.local_size, replicate, mesh, control)


def _as_bytes(value: Any) -> torch.Tensor:
    """A JSON value as a uint8 tensor."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _as_json(content: torch.Tensor) -> Any:
    """The JSON value of a uint8 tensor."""
    return json.loads(content.numpy().tobytes())
