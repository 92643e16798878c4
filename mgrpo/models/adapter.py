"""LoRA: low-rank adapters of a model's linear layers are trained, its own weights are frozen.

The momentum model is a second adapter of the same model, the exponential moving average of the first: A and B are
averaged separately. Forward passes choose an adapter, no weight is copied or swapped.
Letters: W [out, in] weight of a linear layer, A [r, in] and B [out, r] of its adapter: W + scale B A.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mgrpo.config import KernelsConfig, MomentumConfig
from mgrpo.distributed.exchange import LazyWeights
from mgrpo.distributed.sharding import local, rows_of, with_shard
from mgrpo.distributed.sharding import whole as whole_tensor
from mgrpo.errors import ConfigError, InputError, whole
from mgrpo.models.adapter_folder import ALL_LINEAR
from mgrpo.models.files import ADAPTER, ADAPTER_WEIGHTS
from mgrpo.models.momentum import Momentum
from mgrpo.models.plain import plain_logits

if TYPE_CHECKING:
    from peft import LoraConfig as PeftConfig
    from transformers import PreTrainedModel

POLICY, MOMENTUM, INITIAL = "policy", "momentum", "initial"
_PARTS = ("lora_A", "lora_B")
_PREFIX = "base_model.model."  # of names in a folder, as peft wraps a model
# Largest mean change of a sampled token's log-prob, in nats, that rounding the base may cause.
_ROUNDING = 0.03


class Adapter:
    """The adapters of one model: `policy`, which is trained, and frozen ones of the same shapes.

    Args:
        model: in fp32; its linear layers get the adapter, its weights are frozen.
        config: rank, scale and layers, in peft's terms; the layers are filled in.
        seed: of A. B is zero, so that the model computes what it did before.
        folder: takes A and B from there.
        trained: False leaves out whatever only training needs.

    Raises:
        ConfigError: the model has no linear layer, or a target names none.
        InputError: the folder does not hold the weights of this adapter.

    Attributes:
        layers: peft's layers by the dotted name of the layer that each wraps.
        start: A and B of the folder that training continues, or None.
    """

    def __init__(
        self, model: PreTrainedModel, config: PeftConfig, *, seed: int, folder: Path | None = None, trained: bool = True
    ):
        _refuse_targets(model, config)
        self.model, self.config = model, config
        self._add(POLICY)
        self.layers = adapted_layers(model)
        _refuse_layers(self.layers, config)
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.weights(POLICY).items():
            weight.data = weight.data.float()
            if name.endswith(f"lora_A.{POLICY}.weight"):
                drawn = torch.empty(weight.shape)
                torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
                weight.data.copy_(drawn)
        self.start: dict[str, torch.Tensor] | None = None
        if folder is not None:
            self.load(start := self.read(folder))
            if trained:  # the model at the start is then not the base alone
                self.start = start
                self.add_frozen(INITIAL)
        self._activate(POLICY)
        if not isinstance(config.target_modules, str):  # a pattern
            config.target_modules = sorted(config.target_modules or ())  # a set has another order in each process

    def _add(self, name: str) -> None:
        """Injects an adapter; the random numbers that peft draws are nobody else's."""
        from peft import inject_adapter_in_model

        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # that the model has an adapter, that a Conv1D is transposed
            try:
                inject_adapter_in_model(copy.deepcopy(self.config) if name != POLICY else self.config, self.model, name)
            except Exception as error:  # of models whose layers peft does not know
                raise ConfigError(
                    [f"config: --lora.rank needs a model that peft adapts, got: {whole(error)}."]
                ) from error

    def add_frozen(self, name: str) -> None:
        """Adds an adapter that starts as a copy of the policy's and is never trained."""
        self._add(name)
        with torch.no_grad():
            for weight, own in zip(self.weights(name).values(), self.weights(POLICY).values(), strict=True):
                weight.requires_grad_(False)
                weight.data = own.detach().clone()
        self._activate(POLICY)
        for weight in self.weights(POLICY).values():
            weight.requires_grad_(True)

    def weights(self, name: str) -> dict[str, torch.nn.Parameter]:
        """A and B of every layer, under the names of the policy's parameters whichever adapter it is."""
        return {
            f"{layer}.{part}.{POLICY}.weight": getattr(module, part)[name].weight
            for layer, module in self.layers.items()
            for part in _PARTS
        }

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Lets the model compute with one of its adapters; INITIAL is none of them where training began with B = 0."""
        self._activate(name)
        try:
            yield
        finally:
            self._activate(POLICY)

    def _activate(self, name: str) -> None:
        """Chooses the adapter of the next passes; peft would also switch gradients on and off."""
        flags = [(p, p.requires_grad) for module in self.layers.values() for p in module.parameters()]
        for module in self.layers.values():
            if name in module.lora_A:
                module.set_adapter(name)
                module.enable_adapters(True)
            else:
                module.enable_adapters(False)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    def base_weights(self) -> dict[str, torch.Tensor]:
        """The frozen weights, under the names of the model without adapters; a tied one once."""
        shared = {id(p) for p in self.model.parameters() if not p.requires_grad}
        names = plain_state_dict(self.model, keep_vars=True)
        found: dict[int, str] = {}
        for name, tensor in names.items():
            if id(tensor) in shared:
                found.setdefault(id(tensor), name)
        return {name: names[name].detach() for name in found.values()}

    def merged(self, name: str, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
        """The state dict of the model with an adapter merged into it; see MergedWeights."""
        return MergedWeights(self, name, dtype)

    def merge(self) -> None:
        """Merges the policy's adapter into the weights for good, which makes the model a plain one."""
        merged = dict(self.merged(POLICY, torch.float32))
        for name, module in self.layers.items():
            base = module.get_base_layer()
            base.weight.data = merged[f"{name}.weight"]
            self.model.set_submodule(name, base)
        self.layers = {}
        del self.model.peft_config  # pyright: ignore

    @torch.no_grad()
    def cast_base(self, dtype: torch.dtype, *, empty: bool = False) -> bool:
        """Keeps the frozen weights in the dtype of forward passes, unless the model does not tolerate it.

        The adapters stay in fp32. Returns whether the weights have been cast. Of `empty` weights, which are still to be
        read, nothing can be tried.
        """
        frozen = [p for p in self.model.parameters() if not p.requires_grad and p.is_floating_point()]
        adapters = {
            id(p) for module in self.layers.values() for part in _PARTS for p in getattr(module, part).parameters()
        }
        frozen = [p for p in frozen if id(p) not in adapters]
        if empty:
            for parameter in frozen:
                parameter.data = torch.empty_like(parameter, dtype=dtype)
            return True
        device = frozen[0].device
        ids = torch.arange(2, 18, device=device)[None] % self.model.get_input_embeddings().weight.shape[0]  # pyright: ignore

        def logprobs() -> torch.Tensor:
            with torch.autocast(device.type, dtype):
                return torch.log_softmax(plain_logits(self.model, ids).float(), -1)

        own, expected = [p.data for p in frozen], logprobs()
        for parameter in frozen:
            parameter.data = parameter.data.to(dtype)
        try:
            change = (expected.exp() * (logprobs() - expected).abs()).sum(-1).mean()
        except Exception:  # layers that mix dtypes raise anything
            change = torch.tensor(math.inf)
        if change <= _ROUNDING:
            return True
        for parameter, data in zip(frozen, own, strict=True):
            parameter.data = data
        return False

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """Writes weights in peft's layout, which `PeftModel.from_pretrained(base, folder)` loads."""
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(self.config)
        config.inference_mode = True  # as peft saves it
        config.save_pretrained(str(folder))
        tensors = {_in_folder(name): tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """Reads what `save` or peft wrote, in fp32; raises InputError unless it fits this adapter."""
        file = folder / ADAPTER_WEIGHTS
        own = {_in_folder(name): (name, weight) for name, weight in self.weights(POLICY).items()}
        try:
            with safe_open(str(file), "pt") as content:
                found = {key: content.get_tensor(key).float() for key in content.keys()}
        except Exception as error:
            raise InputError(f"model: {file} must be a safetensors file, got: {whole(error)}.") from error
        if other := sorted(own.keys() ^ found.keys()):
            state = "lacks" if other[0] in own else "also holds"
            raise InputError(f"model: {file} must hold A and B of {len(self.layers)} layers, it {state} {other[0]}.")
        for key, (_, weight) in own.items():
            if found[key].shape != weight.shape:
                got = tuple(found[key].shape)
                raise InputError(f"model: {key} of {file} must have shape {tuple(weight.shape)}, got {got}.")
            if not found[key].isfinite().all():
                raise InputError(f"model: {key} of {file} must be finite, got NaN or infinity. The folder is damaged.")
        return {name: found[key] for key, (name, _) in own.items()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Sets the policy's adapter."""
        for name, weight in self.weights(POLICY).items():
            weight.copy_(weights[name])


class MergedWeights(LazyWeights):
    """The state dict of a model without adapters, one of which is merged into it: W + scale B A.

    A merged tensor is computed in fp32 whenever it is read, and cast; no more than one exists at a time. Of sharded
    weights each rank computes its rows, from the whole of A and B. Tied weights have both their names.
    """

    def __init__(self, adapter: Adapter, name: str, dtype: torch.dtype):
        self._name, self._dtype = name, dtype
        self._tensors = plain_state_dict(adapter.model)
        self._layers = {f"{layer}.weight": module for layer, module in adapter.layers.items()}

    @torch.no_grad()
    def __getitem__(self, key: str) -> torch.Tensor:
        tensor, layer = self._tensors[key], self._layers.get(key)
        if layer is None:
            return tensor.detach()
        a, b = (whole_tensor(getattr(layer, part)[self._name].weight) for part in _PARTS)
        change = (b @ a).T if layer.fan_in_fan_out else b @ a
        merged = local(tensor).float().add((change * layer.scaling[self._name])[rows_of(tensor)])
        return with_shard(tensor, merged.to(self._dtype))

    def like(self, key: str) -> torch.Tensor:
        """See LazyWeights."""
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class AdapterMomentum(Momentum):
    """The momentum model as a second adapter, which the model must have: the EMA of A and, separately, of B."""

    def __init__(self, adapter: Adapter, config: MomentumConfig, *, seed: int, kernels: KernelsConfig):
        super().__init__(adapter.model, config, seed=seed, kernels=kernels)
        self.adapter = adapter
        # Parameters of the model, written in place.
        self.weights = {name: weight.detach() for name, weight in adapter.weights(MOMENTUM).items()}

    def state_dict(self, *, for_engine: bool = False) -> dict[str, torch.Tensor]:
        """A and B under the names of the policy's parameters."""
        return dict(self.weights)

    def swapped(self) -> AbstractContextManager[None]:
        """Lets the model compute with this adapter for a while."""
        return self.adapter.using(MOMENTUM)


def adapted_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The layers of a model that hold adapters, by name."""
    if not hasattr(model, "peft_config"):
        return {}
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def plain_state_dict(model: torch.nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    """The state dict of a model without its adapters, under the names that it has without them."""
    layers, found = adapted_layers(model), {}
    for name, tensor in model.state_dict(**options).items():
        layer, separator, rest = name.partition(".base_layer.")
        if separator and layer in layers:
            found[f"{layer}.{rest}"] = tensor
        elif name.partition(".lora_")[0] not in layers:
            found[name] = tensor
    return found


def _in_folder(name: str) -> str:
    """The name of a policy's parameter in an adapter's folder."""
    return _PREFIX + name.removesuffix(f".{POLICY}.weight") + ".weight"


def _linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The layers that an adapter may wrap, the head among them."""
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}


def _refuse_targets(model: PreTrainedModel, config: PeftConfig) -> None:
    """Raises ConfigError for a model without linear layers, and for targets that are none."""
    kind, layers, head = type(model).__name__, _linear_layers(model), model.get_output_embeddings()
    if not any(module is not head for module in layers.values()):
        raise ConfigError([f"config: --lora.rank needs a model with linear layers, {kind} has none. Leave it out."])
    targets = config.target_modules or ()
    if isinstance(targets, str):  # all-linear, or a pattern in a folder, which `_refuse_layers` checks
        return
    parameters, problems = dict(model.named_parameters()), []
    for target in sorted(targets):
        matched = [name for name in dict(model.named_modules()) if name == target or name.endswith(f".{target}")]
        if any(layers.get(name) is head for name in matched) and head.weight is model.get_input_embeddings().weight:  # pyright: ignore
            problems.append(f"config: --lora.targets must leave {target} out, its weight is that of the embedding.")
        elif any(name == target or name.endswith(f".{target}") for name in parameters):
            problems.append(
                f"config: --lora.targets must name linear layers, {target} is a parameter, as the experts of a MoE "
                "are. Adapters of parameters are not offered."
            )
        elif not matched or any(name not in layers for name in matched):
            known = sorted({name.rpartition(".")[2] for name, module in layers.items() if module is not head})
            state = "is no linear layer" if matched else "matches nothing"
            problems.append(
                f"config: --lora.targets must be {ALL_LINEAR} or names of linear layers of {kind}, {target} {state}. "
                f"It has {', '.join(known)}."
            )
    if problems:
        raise ConfigError(problems)


def _refuse_layers(layers: Mapping[str, Any], config: PeftConfig) -> None:
    """Raises ConfigError for a model where peft adapts more than linear layers, or nothing."""
    from peft.tuners.lora import Linear

    other = sorted(name for name, module in layers.items() if type(module) is not Linear)
    if config.target_parameters or other:
        what = ", ".join(config.target_parameters or other[:3])
        raise ConfigError(
            [
                f"config: --lora.targets must be linear layers, peft would adapt {what} (target_parameters), as the "
                "experts of a MoE are. Name the linear layers."
            ]
        )
    if not layers:
        raise ConfigError(
            [f"config: target_modules of {ADAPTER} must match linear layers, {config.target_modules} matches none."]
        )
