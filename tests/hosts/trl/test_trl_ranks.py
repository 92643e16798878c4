"""Votes over whole groups where processes share them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

SUPPORT = Path(__file__).parents[2] / "support"


def run(name: str, folder: Path, world: int) -> list[dict]:
    """Starts `name` once for each process; what each has written."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = SUPPORT / name
    shared = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(SUPPORT.parents[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env=shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.slow
def test_two_processes_elect_what_one_does(tmp_path):
    (alone,), pair = run("trl_ranks.py", tmp_path / "one", 1), run("trl_ranks.py", tmp_path / "two", 2)
    assert pair[0]["credits"] == pair[1]["credits"] == alone["credits"]
    assert [len(credit["labels"]) for credit in alone["credits"]] == [3, 3]
    assert len({str(credit["labels"]) for credit in alone["credits"]}) == 2
    assert any(not all(row) for credit in alone["credits"] for row in credit["keep"])  # the filter had work to do
    assert pair[0]["weights"] == pair[1]["weights"] and pair[0]["momentum"] == pair[1]["momentum"]
    assert pair[0]["advantage"] == pair[1]["advantage"] == pytest.approx(alone["advantage"])
    for kind in ("weights", "momentum"):
        assert pair[0][kind] == pytest.approx(alone[kind], rel=1e-4, abs=1e-3)
    assert pair[0]["loss"] == pytest.approx(alone["loss"], rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_sharded_momentum_is_the_unsharded_one(tmp_path):
    """FSDP2: averages of shards where they lie, weights lent and given back, a file that holds the whole; then
    trainers of whole weights and of adapters."""
    (alone,), pair = run("shards.py", tmp_path / "one", 1), run("shards.py", tmp_path / "two", 2)
    assert pair[0]["callback"] == pair[1]["callback"] == alone["callback"] | {"sharded": True}
    assert not alone["callback"]["sharded"]
    for kind in ("whole", "lora"):
        one, two = alone[kind], pair[0][kind]
        assert two == pair[1][kind]
        for found, sharded in ((one, False), (two, True)):
            assert found["sharded"] == sharded
            assert found["average"] and found["resumed"] and found["saved"], kind
        assert [turn for turn, _ in one["logits"]] == [turn for turn, _ in two["logits"]] == [2, 4] * 2
        for (_, first), (_, second) in zip(one["logits"], two["logits"], strict=True):
            assert first == pytest.approx(second, rel=1e-3, abs=1e-3)
        momentum, policy = (values for _, values in two["logits"][2:])
        assert momentum != pytest.approx(policy, rel=1e-2, abs=1e-2)
