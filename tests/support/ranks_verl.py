"""Two processes of the worker on one model, by torchrun: `ranks_verl.py FOLDER`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import verl  # noqa: F401
from hydra import compose, initialize_config_module
from omegaconf import open_dict
from small_verl import overrides
from torch.distributed.tensor import DTensor

from mgrpo.integrations.verl.worker import MGRPOWorker


class Recorder:
    """Stands where verl's rollout adapter does."""

    async def resume(self, tags: list[str]) -> None:
        pass

    async def update_weights(self, weights: Any, **_: Any) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in weights}


def whole(parameters: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: p.full_tensor().detach().clone() for name, p in parameters.items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    options = [o for o in overrides(folder / "model", folder / "none", folder) if not o.startswith("hydra.")]
    with initialize_config_module("mgrpo.integrations.verl_config", version_base=None):
        config = compose("mgrpo", overrides=options)
    with open_dict(config):
        config.actor_rollout_ref.actor.optim.total_training_steps = 10
        config.actor_rollout_ref.mgrpo = {
            "momentum": {"decay": 0.9},
            "kernels": {},
            "patch_kernels": False,
            "num_optimizer_steps": 10,
            "seed": 0,
        }
    worker = MGRPOWorker(config=config.actor_rollout_ref, role="actor")
    worker.init_model()
    engine = worker.actor.engine
    parameters = dict(engine.module.named_parameters())
    assert all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in parameters.values())
    start = whole(parameters)
    for name, parameter in parameters.items():
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.to_local().fill_(0.1 + len(name))
    engine.optimizer_step()
    now = whole(parameters)
    expected = {name: 0.9 * start[name] + 0.1 * now[name] for name in now}
    assert max(float((now[name] - start[name]).abs().max()) for name in now) > 1e-4

    worker.rollout, worker.layered_summon, worker.peft_merge, worker.base_sync_done = Recorder(), False, False, True
    asyncio.run(worker.update_momentum_weights(global_steps=1))
    for name, value in expected.items():
        torch.testing.assert_close(worker.rollout.weights[name], value, rtol=1e-6, atol=1e-7)

    worker.save_checkpoint(str(folder / "actor"), global_step=1)
    saved = {name: w.to_local().clone() for name, w in worker.momentum.momentum.weights.items()}
    engine.optimizer_step()
    worker.load_checkpoint(str(folder / "actor"))
    found = worker.momentum.momentum.weights
    assert all(torch.equal(found[name].to_local(), value) for name, value in saved.items())
    assert worker.momentum.step == 1
    print(f"SOUND {dist.get_rank()}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
