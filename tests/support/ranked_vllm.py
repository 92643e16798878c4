"""Two steps of training with real vLLM on several ranks: python ranked_vllm.py SIZE PORT FOLDER.

FOLDER has the name of the placement of vLLM, or is "one-engine-of-two" ranks. Rank 0 writes metrics and rollouts of
each step to FOLDER/found.json.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from ranks import main

from mgrpo.config import Config, OptimConfig, RolloutConfig
from mgrpo.distributed.world import World
from mgrpo.presets import make_preset
from mgrpo.training.trainer import Trainer


def make_config(name: str) -> Config:
    base, placement = make_preset("arithmetic"), name.removesuffix("-of-two")
    engine = {"placement": placement, "tensor_parallel": 1 if name == placement else 2, "kv_cache_gib": 0.1}
    return replace(
        base,
        steps=2,
        rollout=RolloutConfig(num_prompts=5, num_policy=3, num_momentum=3, max_new_tokens=24),
        optim=OptimConfig(lr=1e-3, num_minibatches=1, micro_batch_tokens=512),
        momentum=replace(base.momentum, decay=0.5),
        data=replace(base.data, train="arithmetic:12:2-3:5"),
        engine=replace(base.engine, name="vllm", **engine),
        model=replace(base.model, path="builtin:arithmetic32", device="cpu"),
    )


def run(world: World, folder: Path) -> None:
    rows = []
    with closing(Trainer(make_config(folder.name), world=world)) as trainer:
        for _ in range(2):
            result = trainer.train_step()
            rows.append({name: result.metrics[name] for name in ("parity_policy", "parity_momentum", "grad_norm")})
            rows[-1]["tokens"] = result.batch.trajectories.tokens.tolist()
    assert world.gather_json(rows) == [rows] * world.size
    if world.is_first:
        (folder / "found.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(run, timeout_s=500)
