"""Loads and saves models: any causal LM that transformers can load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from mgrpo.config import ConfigError, ModelConfig
from mgrpo.determinism import make_deterministic
from mgrpo.records import InputError
from mgrpo_kernels.backends import resolve

BUILTIN = "builtin:"


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer and what the folder says of its model, without the weights."""

    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    context_length: int
    model_config: PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A causal LM with fp32 weights, its tokenizer, and what sampling must know of them."""

    model: PreTrainedModel
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    context_length: int
    dtype: torch.dtype  # of forward passes and rollouts


def quiet_transformers() -> None:
    """Switches the progress bars of transformers off, for the command lines."""
    logging.disable_progress_bar()


def resolve_path(path: str) -> str:
    """Turns `builtin:NAME` into the folder of a shipped model; other paths pass unchanged."""
    if not path.startswith(BUILTIN):
        return path
    folder = Path(str(files("mgrpo.tasks"))) / f"{path.removeprefix(BUILTIN)}_base"
    if not folder.is_dir():
        shipped = sorted(BUILTIN + p.name.removesuffix("_base") for p in folder.parent.glob("*_base"))
        raise InputError(f"model: --model.path must be one of {shipped}, a folder or a hub id, got {path}.")
    return str(folder)


def pick_device(device: str) -> torch.device:
    """Resolves `auto` to a GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ConfigError([f"config: --model.device must be auto, cpu or cuda[:N], got {device}."]) from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError([f"config: --model.device must be available, got {device} where torch sees no GPU."])
    return picked


def pick_backend(backend: str, device: torch.device) -> str:
    """Resolves --kernels.backend for a device, with MGRPO_BACKEND in place of `auto`, by token_logprob."""
    try:
        return resolve("token_logprob", device, backend, (torch.float32,))
    except ValueError as error:
        problem = (
            str(error).replace("token_logprob: ", "config: ", 1).replace("backend must", "--kernels.backend must", 1)
        )
        raise ConfigError([problem]) from error


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """Loads the tokenizer and the configuration beside it; no weights are read."""
    path = resolve_path(config.path)
    with _loading(config.path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        model_config = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    if not config.trust_remote_code:
        _refuse_code(config.path, tokenizer, model_config)
    try:
        generation_config = GenerationConfig.from_pretrained(path)
    except OSError:  # many folders have none
        generation_config = None
    found = {tokenizer.eos_token_id}
    for holder in (generation_config, model_config):
        ids = getattr(holder, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [ids])
    eos_ids = tuple(sorted(found - {None}))
    if not eos_ids:
        raise InputError(
            f"model: the tokenizer of {config.path} must have an EOS token, got none. "
            "Set eos_token in its tokenizer_config.json, or eos_token_id in generation_config.json."
        )
    return Tokenizer(
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0],
        context_length=context_length(model_config),
        model_config=model_config,
    )


def _refuse_code(path: str, tokenizer: Any, model_config: PretrainedConfig) -> None:
    """Raises InputError for a folder that names code of its own, which transformers may ignore or may ask about."""
    holders = {"tokenizer_config.json": tokenizer.init_kwargs, "config.json": model_config.to_dict()}
    for file, holder in holders.items():
        if code := holder.get("auto_map"):
            raise InputError(
                f"model: {file} of {path} must name no code of its own, got auto_map {code}. "
                "Remove it, or set --model.trust-remote-code after reading that code."
            )


def load_model(config: ModelConfig) -> LoadedModel:
    """Loads tokenizer and model; raises InputError for a folder that can not be trained from."""
    tokenizer = load_tokenizer(config)
    with _loading(config.path):
        model = _with_attention(
            config.attn_implementation,
            lambda attention: AutoModelForCausalLM.from_pretrained(
                resolve_path(config.path),
                dtype=torch.float32,
                use_safetensors=True,
                attn_implementation=attention,
                trust_remote_code=config.trust_remote_code,
            ),
        )
    _check_finite(model, config.path)
    try:
        make_deterministic(model, gradient_checkpointing=config.gradient_checkpointing)
    except ValueError as error:
        raise InputError(
            f"model: --model.gradient-checkpointing needs a model that has it, {type(model).__name__} has not. "
            "Leave it out."
        ) from error
    torch.nn.Module.to(model, pick_device(config.device))
    return LoadedModel(
        model=model,
        tokenizer=tokenizer.tokenizer,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        context_length=tokenizer.context_length,
        dtype=torch.bfloat16 if config.dtype == "bf16" else torch.float32,
    )


def _with_attention(attention: str, load: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """Loads with an implementation of attention; a family that has no sdpa, or no attention at all, takes eager."""
    try:
        return load(attention)
    except ValueError as error:
        if attention != "sdpa" or "scaled_dot_product_attention" not in str(error):
            raise
        return load("eager")


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """Turns what transformers raises for a bad folder or hub id into InputError."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise InputError(f"model: {path} must be a model folder or a reachable hub id, got: {first_line}") from error


def context_length(config: PretrainedConfig) -> int:
    """Longest sequence in tokens that a model was built for."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        length = getattr(config.get_text_config(), name, None)
        if length and length > 0:  # -1 of XLNet is no limit
            return int(length)
    return 2**31


def _check_finite(model: PreTrainedModel, path: str) -> None:
    """Raises InputError for weights that hold NaN or infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"model: {name} of {path} must be finite, got NaN or infinity. The folder is damaged.")


def save_model(folder: Path, model: PreTrainedModel, weights: dict[str, torch.Tensor], tokenizer: Any) -> None:
    """Writes weights in the transformers layout, loadable by AutoModelForCausalLM."""
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def load_weights(folder: Path, *, trust_remote_code: bool = False) -> dict[str, torch.Tensor]:
    """Reads the parameters of a saved model in fp32, under the names of `named_parameters`."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    return dict(model.named_parameters())


@contextmanager
def borrowed_weights(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Lets `model` compute with other weights for a while; nothing is copied where dtype and device agree."""
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.data = weights[name].to(device=parameter.device, dtype=parameter.dtype)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = own[name]
