"""The momentum model beside a policy that transformers' Trainer trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mgrpo.config import KernelsConfig, MomentumConfig
from mgrpo.distributed.sharding import local
from mgrpo.integrations.shared import momentum_tensors, save_tensors
from mgrpo.models.momentum import Momentum

FILE = "momentum.safetensors"  # in a checkpoint


class MomentumCallback(TrainerCallback):
    """Averages the policy into a momentum model after each optimiser step.

    The weights are fp32 whatever the policy's dtype, unless `config` asks for bf16 with stochastic rounding or Kahan
    compensation: plain bf16 would round every update away. Frozen weights are shared with the policy. Under FSDP2 each
    process averages its own shards.

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
        self.momentum = Momentum(policy, self.config, seed=self.seed, kernels=KernelsConfig())

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

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within the block, the policy's module holds the momentum weights."""
        momentum = self.started
        parameters = {name: p for name, p in momentum.policy.named_parameters() if name in momentum.weights}
        if not any(isinstance(parameter, DTensor) for parameter in parameters.values()):
            with momentum.swapped():
                yield
            return
        # FSDP2 gathers from the shards' own storage.
        own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        _write(parameters, momentum.weights)
        try:
            yield
        finally:
            _write(parameters, own)

    def save(self, folder: Path, *, is_main: bool) -> None:
        """Writes the full weights and their Kahan terms into a checkpoint; every process must call it."""
        tensors = {name: _whole(tensor) for name, tensor in momentum_tensors(self.started).items()}
        if is_main:
            save_tensors(folder / FILE, tensors)

    def load(self, folder: Path, policy: torch.nn.Module) -> None:
        """Restores what `save` wrote, bit for bit; raises FileNotFoundError if there is no file."""
        path = folder / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"MomentumCallback: {path} must exist to resume, it does not. Resume from a checkpoint of MGRPOTrainer."
            )
        self.start(policy)
        tensors, wanted = load_file(path), momentum_tensors(self.started)
        if wanted.keys() != tensors.keys():
            known = len(wanted.keys() & tensors)
            raise ValueError(
                f"MomentumCallback: {path} must hold {len(wanted)} tensors of this model and momentum_dtype, got "
                f"{len(tensors)}, of which {known} are known. Resume with the options of the run."
            )
        _write(wanted, tensors)

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The full momentum model under every name of the policy's state dict; every process must call it."""
        return {name: _whole(tensor) for name, tensor in self.started.state_dict().items()}


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


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor on the host; every process must call it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


@torch.no_grad()
def _write(targets: dict[str, Any], values: dict[str, torch.Tensor]) -> None:
    """Copies full tensors into full or sharded ones of the same name."""
    for name, target in targets.items():
        value = values[name].to(device=target.device, dtype=target.dtype)
        if isinstance(target, DTensor) and not isinstance(value, DTensor):
            value = distribute_tensor(value, target.device_mesh, target.placements)
        target.copy_(value)
