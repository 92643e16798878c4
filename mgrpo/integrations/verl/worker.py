"""verl's worker with a momentum model, averaged on the policy's shards and lent to the rollout engine."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from verl.single_controller.base.decorator import Dispatch, register  # pyright: ignore[reportMissingImports]
from verl.workers.engine_workers import ActorRolloutRefWorker  # pyright: ignore[reportMissingImports]

from mgrpo.config import KernelsConfig, MomentumConfig
from mgrpo.distributed.sharding import local
from mgrpo.integrations import patch_kernels
from mgrpo.integrations.shared import load_tensors, momentum_tensors, save_tensors
from mgrpo.integrations.verl import plugin
from mgrpo.models.momentum import Momentum


class EngineMomentum:
    """The momentum model of a training engine, averaged after each of its optimiser steps.

    Args:
        engine: verl's engine, whose `module` is a plain module or one of FSDP2, and whose `optimizer_step` returns
            the norm of the gradient. A step that verl skips for a non-finite gradient averages nothing.
        config: decay, schedule, storage.
        num_steps: optimiser steps of the run.
        seed: of stochastic rounding.
        kernels: backend of mgrpo_kernels.
    """

    def __init__(
        self,
        engine: Any,
        config: MomentumConfig,
        *,
        num_steps: int,
        seed: int = 0,
        kernels: KernelsConfig | None = None,
    ):
        self.engine, self.num_steps = engine, num_steps
        self.momentum = Momentum(engine.module, config, seed=seed, kernels=kernels or KernelsConfig())
        self.step = 0
        self._optimizer_step = engine.optimizer_step
        engine.optimizer_step = self._step

    def _step(self) -> Any:
        """The engine's optimiser step, then one average."""
        norm = self._optimizer_step()
        if torch.isfinite(torch.as_tensor(norm)).all():
            self.momentum.update(self.step, self.num_steps)
            self.step += 1
        return norm

    def lent(self) -> AbstractContextManager[None]:
        """Within the block, the policy's weights, or its adapter's, which verl sends to its engine, are the averages.

        They are exchanged in place, because verl reads an adapter from several places, and merges it where asked.
        """
        return self.momentum.swapped()

    def save(self, folder: Path) -> None:
        """Writes this process's shards, their Kahan terms and the step into a temporary file, then renames it."""
        tensors = momentum_tensors(self.momentum)
        shards = {name: local(tensor).detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_tensors(folder / file_name(), shards, {"format": "mgrpo", "step": str(self.step)})

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, bit for bit.

        Raises:
            FileNotFoundError: no file for this process and this number of processes.
            ValueError: tensors of another model, or of another momentum.dtype.
        """
        path = folder / file_name()
        if not path.is_file():
            raise FileNotFoundError(
                f"mgrpo: {path} must exist to resume, it does not. Resume from a checkpoint of trainer mode mgrpo, on "
                "as many processes as wrote it, or start anew with trainer.resume_mode=disable."
            )
        targets = {name: local(tensor) for name, tensor in momentum_tensors(self.momentum).items()}
        self.step = int(load_tensors(targets, path, "shards of this model and momentum.dtype")["step"])


def file_name() -> str:
    """File of this process's shards in a checkpoint, named like verl's own."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return f"momentum_world_size_{size}_rank_{rank}.safetensors"


class MGRPOWorker(ActorRolloutRefWorker):
    """verl's hybrid worker with a momentum model; its options are under `actor_rollout_ref.mgrpo`."""

    momentum: EngineMomentum | None = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def describe_plugin(self) -> dict[str, Any]:
        """State of the plug-in in this process."""
        return plugin.describe()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Builds verl's models and a momentum model."""
        options = self.config.mgrpo
        if options.patch_kernels:
            # For the life of the process, and before the engines store their functions.
            patch_kernels(importlib.import_module("verl"))
        super().init_model()
        if "actor" in self.role:
            self.momentum = EngineMomentum(
                self.actor.engine,
                MomentumConfig(**options["momentum"]),
                num_steps=options.num_optimizer_steps,
                seed=options.seed,
                kernels=KernelsConfig(**options["kernels"]),
            )

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_momentum_weights(self, global_steps: int | None = None, mode: str = "naive") -> None:
        """Updates the rollout engine, which must be asleep, with the momentum model."""
        assert self.momentum is not None, "no actor here"
        with self.momentum.lent():
            await super().update_weights(global_steps=global_steps, mode=mode)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(
        self,
        local_path: str,
        hdfs_path: str | None = None,
        global_step: int = 0,
        max_ckpt_to_keep: int | None = None,
    ) -> None:
        """Verl's checkpoint, with the momentum model beside it."""
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)
        assert self.momentum is not None, "no actor here"
        self.momentum.save(Path(local_path))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False
    ) -> None:
        """Loads the momentum model first, because verl may delete the folder afterwards."""
        assert self.momentum is not None, "no actor here"
        self.momentum.load(Path(local_path))
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load)
