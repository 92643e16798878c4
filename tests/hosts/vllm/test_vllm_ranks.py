"""Real vLLM with two ranks of the trainer on a CPU: `make test-vllm`."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from ranks import run_script

from mgrpo.rollout.parity import BOUNDS

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]


@pytest.mark.parametrize(
    "placement", ["one-engine", "one-engine-of-two", pytest.param("two-engines", marks=pytest.mark.long)]
)
def test_sharded_weights_arrive_before_every_rollout(tmp_path, placement):
    """An engine in each of two ranks, one of both with tensor parallelism, or two servers for both."""
    folder = tmp_path / placement
    folder.mkdir()
    printed = run_script("ranked_vllm.py", 2, folder, timeout_s=1200)
    assert "Traceback" not in printed, printed
    rows = json.loads((folder / "found.json").read_text())
    for row in rows:
        assert row["parity_policy"] < BOUNDS[torch.float32] and row["parity_momentum"] < BOUNDS[torch.float32]
    assert len(rows) == 2 and rows[0]["grad_norm"] > 0
