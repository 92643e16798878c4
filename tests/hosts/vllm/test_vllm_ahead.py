"""Two real vLLM servers: rollouts of the next step while this one trains."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from mgrpo.config import Config
from mgrpo.models.load import load_model
from mgrpo.presets import make_preset
from mgrpo.rollout.build import vllm_options
from mgrpo.rollout.parity import BOUNDS
from mgrpo.rollout.vllm.process import ServerProcess
from mgrpo.training.trainer import Trainer
from mgrpo.types import WeightTag

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
BASE = "builtin:arithmetic32"
STEPS = 4


def make_config(urls: tuple[str, ...], *, ahead: int, steps: int = STEPS, **sizes: int) -> Config:
    base = make_preset("arithmetic")
    sizes = {"num_prompts": 8, "num_policy": 6, "num_momentum": 4, "parity_every": 1} | sizes
    return replace(
        base,
        steps=steps,
        rollout=replace(base.rollout, ahead=ahead, **sizes),
        engine=replace(base.engine, name="vllm", placement="server", servers=urls),
        optim=replace(base.optim, num_minibatches=1),
        model=replace(base.model, path=BASE, device="cpu"),
    )


@pytest.fixture(scope="module")
def urls():
    """Two servers, which both runs use one after the other."""
    loaded = load_model(make_config(("http://a", "http://b"), ahead=1).model)
    options = vllm_options(
        loaded, replace(make_preset("arithmetic").engine, name="vllm", kv_cache_gib=0.1), max_length=128
    )
    start = {"dtype": torch.float32, "max_length": 128, "options": options, "device": ""}
    processes: list[ServerProcess] = []
    try:
        for _ in range(2):
            processes.append(ServerProcess(loaded.model, **start))
        for process in processes:
            process.wait()
        yield tuple(process.url for process in processes)
    finally:
        for process in processes:
            process.close()


def test_two_servers_sample_ahead_with_weights_one_step_older(urls):
    """The first batch is the one of a run without; two prompts alone get the tokens that they have in their batch."""
    found = {}
    for ahead in (0, 1):
        with closing(Trainer(make_config(urls, ahead=ahead))) as trainer:
            found[ahead] = [trainer.train_step() for _ in range(STEPS - 1)]
            if ahead:  # two prompts of the batch in flight once more, by the weights that both servers still hold
                trainer.source.settle()
                prompts = trainer.data.prompts
                indices = trainer.source.state()[0]["prompts"]
                sampling = replace(trainer.generator.sampling(STEPS, "policy"), indices=(5, 2))
                asked = [prompts[indices[b]].ids for b in (5, 2)]
                part = trainer.engine.generate(asked, 6, sampling, WeightTag("policy", STEPS - 2))
            found[ahead].append(trainer.train_step())
    last = found[1][-1].batch.trajectories
    rows = [10 * b + i for b in (5, 2) for i in range(6)]
    assert [part.response(row) for row in range(12)] == [last.response(row) for row in rows]
    rows = {ahead: [result.metrics for result in results] for ahead, results in found.items()}
    assert [row["rollout_age"] for row in rows[0]] == [0] * STEPS
    assert [row["rollout_age"] for row in rows[1]] == [0] + [1] * (STEPS - 1)
    for row in rows[0] + rows[1]:
        assert row["parity_policy"] < BOUNDS[torch.float32] and row["parity_momentum"] < BOUNDS[torch.float32]
    first, other = (found[ahead][0].batch.trajectories for ahead in (0, 1))
    assert torch.equal(first.tokens, other.tokens)
    # Under weights of now the engine's log-probs are the trainer's, under older ones they are not.
    assert max(row["logprob_gap"] for row in rows[0]) < 1e-4 < min(row["logprob_gap"] for row in rows[1][1:])
