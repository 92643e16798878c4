from __future__ import annotations

import json

import pytest
import torch
from exchange_checks import CHECKS
from ranks import run_sizes

from mgrpo.distributed.exchange import WeightStream


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of each check on each rank, by number of ranks."""
    folders = run_sizes("exchange_checks.py", (2, 3, 4), tmp_path_factory.mktemp("exchange"))
    return {
        size: [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
        for size, folder in folders.items()
    }


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("check", CHECKS)
def test_several_processes(outcomes, size, check):
    assert [found[check] for found in outcomes[size]] == [None] * size


def test_replicas_of_shards(outcomes):
    assert outcomes[4] == [{"replicas": None}] * 4


def test_one_process_gets_the_tensors_themselves_each_when_its_turn_comes():
    read = []

    class Lazy(dict[str, torch.Tensor]):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    weights = Lazy(a=torch.ones(3), b=torch.zeros(2))
    with WeightStream(weights, dtype=torch.bfloat16) as stream:
        assert stream.names == ["a", "b"] and read == []
        for name, tensor in stream:
            assert read[-1] == name and tensor.data_ptr() == dict.__getitem__(weights, name).data_ptr()
    assert read == ["a", "b"]
