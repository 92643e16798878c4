"""The momentum model beside a policy that transformers' Trainer trains."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mgrpo.config import KernelsConfig, MomentumConfig
from mgrpo.distributed.sharding import local
from mgrpo.integrations.shared import load_tensors, momentum_tensors, on_host, save_tensors
from mgrpo.integrations.trl.adapter import MOMENTUM, WEIGHTS, AdapterMomentum, has_momentum_adapter
from mgrpo.models.momentum import Momentum

FILE = "momentum.safetensors"  # in a checkpoint


class MomentumCallback(TrainerCallback):
    """Averages the policy into a momentum model after each optimiser step.

    The weights are fp32 whatever the policy's dtype, unless `config` asks for bf16 with stochastic rounding or Kahan
    compensation: plain bf16 would round every update away. Frozen weights are shared with the policy. Under FSDP2 each
    process averages its own shards. Of a peft model with a momentum adapter, that adapter is averaged.

    Args:
        config: decay, schedule, storage.
        seed: of stochastic rounding.
    """

    def __init__(self, config: MomentumConfig, *, seed: int = 0):
        self.config, self.seed = config, seed
        self.momentum: Momentum | None = None

    @property
    def started(self) -> Momentum:
        """The momentum model; RuntimeError before training."""
        if self.momentum is None:
            raise RuntimeError("MomentumCallback: training must have begun, got no policy yet. Call it in train().")
        return self.momentum

    def start(self, policy: torch.nn.Module) -> None:
        """Copies the policy."""
        kind = AdapterMomentum if has_momentum_adapter(policy) else Momentum
        self.momentum = kind(policy, self.config, seed=self.seed, kernels=KernelsConfig())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copies the policy, unless weights were loaded from a checkpoint."""
        if self.momentum is None:
            self.start(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Averages once; raises FloatingPointError if the policy is non-finite, which the average would keep."""
        momentum = self.started
        if not all_finite(momentum.policy):
            raise FloatingPointError(
                f"MomentumCallback: the policy must be finite, got NaN or infinity after step {state.global_step}. "
                "The momentum model is that of the step before. Resume from an earlier checkpoint."
            )
        momentum.update(state.global_step - 1, state.max_steps)

    def lent(self) -> AbstractContextManager[None]:
        """Within the block, the policy's module computes with the momentum weights."""
        return self.started.swapped()

    def save(self, folder: Path, *, is_main: bool) -> None:
        """Writes the full weights and their Kahan terms into a checkpoint; every process must call it."""
        if isinstance(self.started, AdapterMomentum):
            self.started.save(folder / MOMENTUM, is_main=is_main)
            return
        tensors = {name: on_host(tensor) for name, tensor in momentum_tensors(self.started).items()}
        if is_main:
            save_tensors(folder / FILE, tensors)

    def load(self, folder: Path, policy: torch.nn.Module) -> None:
        """Restores what `save` wrote, bit for bit; raises FileNotFoundError if there is no file."""
        self.start(policy)
        is_adapter = isinstance(self.started, AdapterMomentum)
        path = folder / MOMENTUM / WEIGHTS if is_adapter else folder / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"MomentumCallback: {path} must exist to resume, it does not. Resume from a checkpoint of MGRPOTrainer."
            )
        if isinstance(self.started, AdapterMomentum):
            self.started.restore(path.parent)
        else:
            load_tensors(momentum_tensors(self.started), path)

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The full momentum model under every name of the policy's state dict; every process must call it."""
        return {name: on_host(tensor) for name, tensor in self.started.state_dict().items()}


@torch.no_grad()
def all_finite(module: torch.nn.Module) -> bool:
    """Whether every trained parameter is finite, on all processes."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        return True
    finite = torch.stack([local(p).isfinite().all() for p in parameters]).all()
    if isinstance(parameters[0], DTensor):
        finite = finite.int()
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return bool(finite)
