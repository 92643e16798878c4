"""LoRA in TRL: the momentum model is a second adapter of the policy's peft model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model

from mgrpo.config import KernelsConfig, MomentumConfig
from mgrpo.distributed.sharding import local, reshard
from mgrpo.integrations.shared import load_tensors, on_host, save_tensors
from mgrpo.models.momentum import Momentum

MOMENTUM = "momentum"  # name of the adapter, and of its folder in a checkpoint
WEIGHTS, LOST = "adapter_model.safetensors", "lost.safetensors"  # A and B in peft's layout, and their Kahan terms
_POLICY = "default"  # TRL's name of the adapter that is trained
_DTYPES = {"fp32": torch.float32}
# Settings of a LoraConfig with which an adapter is more than A and B of linear layers.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
    "use_dora": (False,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
}


def add_momentum_adapter(model: Any, config: MomentumConfig) -> None:
    """Adds a frozen copy of a peft model's adapter, before the model is sharded; nothing for a model without.

    Raises:
        ValueError: an adapter that is not plain LoRA, or a momentum model on another device.
    """
    if not is_peft_model(model):
        return
    policy = model.peft_config.get(_POLICY)
    if policy is None or model.active_adapters != [_POLICY]:
        got = f"{model.active_adapters} of {sorted(model.peft_config)}"
        raise ValueError(f"MGRPOTrainer: the active adapter must be {_POLICY!r}, got {got}.")
    for name, known in _PLAIN.items():
        if (value := getattr(policy, name, known[0])) not in known:
            raise ValueError(
                f"MGRPOTrainer: peft_config must be plain LoRA, with {name} {known[0]}, got {value}. The momentum "
                "model is a second adapter of A and B alone."
            )
    if config.device != "same":
        raise ValueError(
            f"MGRPOTrainer: momentum_device must be same with peft_config, got {config.device}. The momentum model "
            "is an adapter of the same model."
        )
    own = copy.deepcopy(policy)
    own.init_lora_weights, own.lora_dropout, own.inference_mode = True, 0.0, True
    with torch.random.fork_rng():  # what peft draws for A, which is overwritten
        model.add_adapter(MOMENTUM, own)
    parameters = dict(model.named_parameters())
    for name, weight in parameters.items():
        if weight.requires_grad:
            twin = parameters[_twin(name)].requires_grad_(False)
            twin.data = weight.detach().to(_DTYPES.get(config.dtype, torch.bfloat16), copy=True)


def has_momentum_adapter(model: Any) -> bool:
    """Whether `add_momentum_adapter` has added one."""
    return MOMENTUM in getattr(model, "peft_config", ())


class AdapterMomentum(Momentum):
    """The EMA of the policy's A and, separately, of its B, in the adapter that `add_momentum_adapter` made."""

    @torch.no_grad()
    def __init__(self, policy: Any, config: MomentumConfig, *, seed: int, kernels: KernelsConfig):
        super().__init__(policy, config, seed=seed, kernels=kernels)
        parameters = dict(policy.named_parameters())
        for name, weight in self.weights.items():
            own = parameters[_twin(name)]
            if local(own) is own:
                own.data = weight  # peft casts an adapter that it loads
            else:
                local(own).copy_(local(weight))
                self.weights[name] = own.detach()

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Lets the model compute with the momentum adapter for a while."""
        activate(self.policy, MOMENTUM)
        try:
            yield
        finally:
            activate(self.policy, _POLICY)

    def save(self, folder: Path, *, is_main: bool) -> None:
        """Writes the adapter in peft's layout, its Kahan terms beside it; every process must call it."""
        tensors = {name: on_host(weight) for name, weight in self._in_folder(self.weights).items()}
        lost = {name: on_host(term) for name, term in (self.compensation or {}).items()}
        if not is_main:
            return
        save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        if lost:
            save_tensors(folder / LOST, lost)
        model: Any = self.policy
        config = copy.deepcopy(model.peft_config[MOMENTUM])
        config.base_model_name_or_path = config.base_model_name_or_path or model.get_base_model().name_or_path or None
        config.save_pretrained(str(folder))

    def restore(self, folder: Path) -> None:
        """Restores what `save` wrote, bit for bit; raises ValueError for other weights."""
        load_tensors(self._in_folder(self.weights), folder / WEIGHTS)
        if self.compensation:
            load_tensors(self.compensation, folder / LOST)

    def _in_folder(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors under their names in a folder of peft."""
        return {name.replace(f".{_POLICY}.", "."): tensor for name, tensor in weights.items()}


def activate(model: Any, adapter: str) -> None:
    """Chooses the adapter of the next passes; peft alone would also switch gradients on and off."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.set_adapter(adapter)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


@contextmanager
@torch.no_grad()
def base_restored(model: torch.nn.Module) -> Iterator[None]:
    """Restores the bits of the weights into which TRL merges an adapter; taking it out again leaves rounding errors.

    Needs memory for a copy of these weights.
    """
    reshard(model)
    base = [local(weight.detach()) for name, weight in model.named_parameters() if ".base_layer." in name]
    kept = [weight.clone() for weight in base]
    try:
        yield
    finally:
        for weight, values in zip(base, kept, strict=True):
            weight.copy_(values)


def _twin(name: str) -> str:
    """The momentum adapter's parameter for one of the policy's."""
    return name.replace(f".{_POLICY}.", f".{MOMENTUM}.")
