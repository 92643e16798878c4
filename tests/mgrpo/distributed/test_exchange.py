from __future__ import annotations

import json

import pytest
import torch
from exchange_checks import CHECKS
from ranks import run_script

from mgrpo.distributed.exchange import WeightStream


@pytest.fixture(scope="module", params=[2, 3])
def outcomes(request, tmp_path_factory):
    """What became of each check on each rank."""
    return run(request.param, tmp_path_factory.mktemp(f"exchange{request.param}"))


def run(size, folder):
    run_script("exchange_checks.py", size, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.parametrize("check", CHECKS)
def test_several_processes(outcomes, check):
    assert [found[check] for found in outcomes] == [None] * len(outcomes)


def test_replicas_of_shards(tmp_path):
    assert run(4, tmp_path) == [{"replicas": None}] * 4


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
