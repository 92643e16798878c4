from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from ranks import run_sizes
from world_checks import CHECKS

from mgrpo.distributed.world import World, find_world, join_world
from mgrpo.errors import ConfigError

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What became of each check, by number of ranks, in a file of each rank."""
    return run_sizes("world_checks.py", (2, 3), tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("check", CHECKS)
def test_several_processes(folders, size, check):
    outcomes = [json.loads((folders[size] / f"{rank}.json").read_text()) for rank in range(size)]
    assert [found[check] for found in outcomes] == [None] * size


def test_one_process_is_the_same_code_without_a_group(monkeypatch):
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    world = join_world("cpu")
    assert world == find_world() == World() and world.mesh is None and not dist.is_initialized()
    value, tensor = {"a": object()}, torch.arange(3)
    assert world.broadcast(value) is value and world.gather_json(value) == [value]
    assert world.any(True) and not world.any(False)
    assert world.sum_(tensor) is tensor and tensor.tolist() == [0, 1, 2]
    world.broadcast_tensors([tensor])
    world.barrier()
    world.close()


def test_the_world_is_found_in_the_environment_of_a_launcher(monkeypatch):
    for name, value in zip(PLACE, ("5", "8", "1", "4"), strict=True):
        monkeypatch.setenv(name, value)
    assert find_world() == World(rank=5, size=8, local_rank=1, local_size=4)
    monkeypatch.setenv("RANK", "many")
    assert find_world().rank == 0
    assert not dist.is_initialized()


def test_replicas_must_divide_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"--distributed.replicate must divide the number of processes \(4\), got 3"):
        join_world("cpu", replicate=3)
