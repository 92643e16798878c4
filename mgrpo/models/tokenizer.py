"""Loads a tokenizer and the configuration beside it, without the weights."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
)

from mgrpo.config import ModelConfig
from mgrpo.errors import InputError
from mgrpo.models.adapter_folder import base_of
from mgrpo.models.files import (
    BUILTIN,
    CONFIG,
    GENERATION,
    check_folder,
    reading,
    silence,
    token_ids,
)

# Either of these makes a folder one of a tokenizer.
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer and the configuration of its model, without the weights."""

    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    context_length: int
    model_config: PretrainedConfig


def resolve_path(path: str) -> str:
    """Turns `builtin:NAME` into the folder of a shipped model; other paths pass unchanged."""
    if not path.startswith(BUILTIN):
        return path
    folder = Path(str(files("mgrpo.tasks"))) / f"{path.removeprefix(BUILTIN)}_base"
    if not folder.is_dir():
        shipped = sorted(BUILTIN + p.name.removesuffix("_base") for p in folder.parent.glob("*_base"))
        raise InputError(f"model: --model.path must be one of {shipped}, a folder or a hub id, got {path}.")
    return str(folder)


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """Loads the tokenizer and the configuration beside it; no weights are read.

    An adapter has the configuration of its base, and its tokenizer too unless its own folder holds one.
    """
    path, trusted = resolve_path(config.path), config.trust_remote_code
    check_folder(path)
    holder, path = path, resolve_path(base_of(path))
    if holder != path:
        check_folder(path)
    holder = holder if any((Path(holder) / name).is_file() for name in TOKENIZERS) else path
    with reading(path, CONFIG):
        model_config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
    with reading(holder):
        tokenizer = AutoTokenizer.from_pretrained(holder, trust_remote_code=trusted)
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
    """The generation_config.json of a folder or hub id; None if there is none."""
    is_local = Path(path).is_dir()
    if is_local and not (Path(path) / GENERATION).is_file():
        return None
    with silence(), reading(path, GENERATION):
        try:
            return GenerationConfig.from_pretrained(path)
        except OSError as error:
            if is_local or isinstance(error.__context__, ValueError):  # the file exists and is not JSON
                raise
            return None


def _refuse_code(path: str, tokenizer: Any, model_config: PretrainedConfig) -> None:
    """Raises InputError for a folder that names its own code, which transformers may ignore or ask about."""
    holders = {"tokenizer_config.json": tokenizer.init_kwargs, "config.json": model_config.to_dict()}
    for file, holder in holders.items():
        if code := holder.get("auto_map"):
            raise InputError(
                f"model: {file} of {path} must name no code of its own, got auto_map {code}. "
                "Remove it, or set --model.trust-remote-code after reading that code."
            )


def context_length(config: PretrainedConfig) -> int:
    """Longest sequence of a model in tokens."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"):
        length = getattr(config.get_text_config(), name, None)
        if length and length > 0:  # -1 of XLNet is no limit
            return int(length)
    return 2**31
