"""Loads and saves models: any causal LM that transformers can load."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
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
from mgrpo.model_files import CONFIG, GENERATION, check_folder, reading, refuse_lost, token_ids
from mgrpo.records import InputError
from mgrpo.saving import make_savable
from mgrpo_kernels.backends import resolve

BUILTIN = "builtin:"
DEVICE = re.compile(r"cpu|cuda(?::(0|[1-9]\d{0,5}))?")
# Tokens that a tokenizer may put into a prompt or beside it unasked.
SPECIAL_TOKENS = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")


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
    # torch knows devices by name that this build or the kernels have not: mps, xpu, xla, meta.
    match = DEVICE.fullmatch(device)
    if match is None:
        raise ConfigError([f"config: --model.device must be auto, cpu or cuda[:N], got {device}."])
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError([f"config: --model.device must be available, got {device} where torch sees no GPU."])
    if int(match[1] or 0) >= max(torch.cuda.device_count(), 1):
        raise ConfigError(
            [f"config: --model.device must be one of {torch.cuda.device_count()} GPUs, from cuda:0 on, got {device}."]
        )
    return torch.device(device)


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
    path, trusted = resolve_path(config.path), config.trust_remote_code
    check_folder(path)
    with reading(path, CONFIG):
        model_config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
    with reading(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trusted)
        tokenizer("0")
    if not trusted:
        _refuse_code(config.path, tokenizer, model_config)
    holders = {"the tokenizer": tokenizer, CONFIG: model_config, GENERATION: _read_generation_config(path)}
    found = [
        token_ids(getattr(holder, "eos_token_id", None), tokenizer, f"{name} of {config.path}")
        for name, holder in holders.items()
    ]
    eos_ids = tuple(sorted(set(chain(*found))))
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


def _read_generation_config(path: str) -> GenerationConfig | None:
    """The generation_config.json of a folder or hub id; many have none."""
    is_local = Path(path).is_dir()
    if is_local and not (Path(path) / GENERATION).is_file():
        return None
    with _silence(), reading(path, GENERATION):
        try:
            return GenerationConfig.from_pretrained(path)
        except OSError as error:
            if is_local or isinstance(error.__context__, ValueError):  # it is there and is no JSON
                raise
            return None


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
    model = _read_model(
        resolve_path(config.path),
        config.path,
        attention=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    _check_ids(model, tokenizer, config.path)
    if dropped := make_savable(model):
        print(
            f"model: {GENERATION} of {config.path} is saved without {', '.join(dropped)}: its values contradict one "
            "another, and transformers does not write them.",
            file=sys.stderr,
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
        context_length=min(tokenizer.context_length, _num_positions(model)),
        dtype=torch.bfloat16 if config.dtype == "bf16" else torch.float32,
    )


def _with_attention(attention: str | None, load: Callable[[str | None], Any]) -> Any:
    """Loads with an implementation of attention; a family that has no sdpa, or no attention at all, takes eager."""
    try:
        return load(attention)
    except ValueError as error:
        if attention != "sdpa" or "scaled_dot_product_attention" not in str(error):
            raise
        return load("eager")


@contextmanager
def _silence() -> Iterator[None]:
    """Lets transformers log errors alone for a while."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _read_model(path: str | Path, name: str, *, attention: str | None = None, **options: Any) -> PreTrainedModel:
    """Reads a model in fp32, of which no parameter is missing; `name` is that of the folder in messages."""
    read: Any = AutoModelForCausalLM.from_pretrained
    # What transformers tells in tables is said below in a line.
    with _silence(), reading(name, CONFIG, unless=(OSError, ValueError, RuntimeError, ImportError, SafetensorError)):
        model, loading = _with_attention(
            attention,
            lambda attention: read(
                path,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                attn_implementation=attention,
                **options,
            ),
        )
    refuse_lost(loading, name)
    return model


def num_embeddings(model: torch.nn.Module) -> int | None:
    """Rows of the input embedding, which ids must stay below; None of a model that does not tell."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)  # pyright: ignore
    except (AttributeError, NotImplementedError):
        return None
    return None if weight is None else len(weight)


def _check_ids(model: PreTrainedModel, tokenizer: Tokenizer, path: str) -> None:
    """Raises InputError for a special token of the tokenizer that the embedding has no row for."""
    special = {f"{name}_token": getattr(tokenizer.tokenizer, f"{name}_token_id", None) for name in SPECIAL_TOKENS}
    special |= {"pad": tokenizer.pad_id} | {"EOS token": max(tokenizer.eos_ids)}
    rows = num_embeddings(model)
    for name, token in special.items():
        if rows is not None and token is not None and token >= rows:
            raise InputError(
                f"model: {name} of {path} must be below {rows}, the rows of its embedding, got {token}. "
                "Resize the embedding, or take the tokenizer that the model was made with."
            )
    if rows is not None and max(tokenizer.tokenizer.all_special_ids, default=0) >= rows:
        print(
            f"model: some special tokens of {path} have no row in its embedding: no prompt may hold them.",
            file=sys.stderr,
        )


def context_length(config: PretrainedConfig) -> int:
    """Longest sequence in tokens that a model was built for."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"):
        length = getattr(config.get_text_config(), name, None)
        if length and length > 0:  # -1 of XLNet is no limit
            return int(length)
    return 2**31


def _num_positions(model: torch.nn.Module) -> int:
    """Positions that the model's own table of them has rows for; RoBERTa and its kin begin after the padding's."""
    rows = [
        len(module.weight) - module.padding_idx - 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings")
        and isinstance(module, torch.nn.Embedding)
        and module.padding_idx is not None
    ]
    return min(rows, default=2**31)


def _check_finite(model: PreTrainedModel, path: str) -> None:
    """Raises InputError for weights that hold NaN or infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"model: {name} of {path} must be finite, got NaN or infinity. The folder is damaged.")


def load_weights(folder: Path, *, trust_remote_code: bool = False) -> dict[str, torch.Tensor]:
    """Reads the parameters of a saved model in fp32, under the names of `named_parameters`."""
    return dict(_read_model(folder, str(folder), trust_remote_code=trust_remote_code).named_parameters())


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
