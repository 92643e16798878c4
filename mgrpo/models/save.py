"""Writes models and tokenizers in the transformers layout, and tries beforehand whether it can."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mgrpo.errors import InputError, StorageError, whole


def save_model(folder: Path, model: Any, weights: dict[str, torch.Tensor], tokenizer: Any) -> None:
    """Writes weights in the transformers layout, loadable by AutoModelForCausalLM."""
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def try_save(folder: Path, model: Any, weights: Mapping[str, Mapping[str, torch.Tensor]], tokenizer: Any) -> None:
    """Writes what `save_model` would, but of each weight the first column alone, which takes next to no room.

    Args:
        folder: one that may be filled.
        model: whose configuration is written.
        weights: state dicts by the name of their folder. Names and shared memory are as in earnest.
        tokenizer: is written once.

    Raises:
        InputError: transformers refuses to write the model or the tokenizer.
        StorageError: the disk does.
    """
    try:
        for name, tensors in weights.items():
            thin = {key: tensor[..., :1] if tensor.ndim else tensor for key, tensor in tensors.items()}
            try:
                model.save_pretrained(folder / name, state_dict=thin)
            except Exception as error:
                if is_of_storage(error):
                    raise
                # A layout that needs whole tensors tells with those; one that can not be saved fails again.
                model.save_pretrained(folder / name, state_dict=dict(tensors))
        tokenizer.save_pretrained(folder / next(iter(weights)))
    except Exception as error:
        if is_of_storage(error):
            raise StorageError(f"run: {folder.parent} must take what is written, got: {whole(error)}.") from error
        raise InputError(f"model: what can not be saved is not trained, saving failed with: {whole(error)}.") from error


def is_of_storage(error: Exception) -> bool:
    """Whether an error is of the disk; the tokenizers' and safetensors' libraries say so in the text alone."""
    return (isinstance(error, OSError) and error.errno is not None) or "(os error " in str(error)


def make_savable(model: Any) -> list[str]:
    """Resets the values of a model's generation_config which transformers refuses to write; returns their names.

    Sampling values without `do_sample`, say: it loads such a file with a warning, and saves no model that has one.
    """
    config = getattr(model, "generation_config", None)
    if config is None or _is_valid(config):
        return []
    default = type(config)()
    values = {name: value for name, value in config.to_diff_dict().items() if name != "transformers_version"}
    kept = copy.deepcopy(config)
    for name in values:
        _reset(kept, name, default)
    left = dict(values)
    # Until nothing more fits in: temperature does once do_sample is there.
    while added := [name for name in left if _fits(kept, name, left[name])]:
        for name in added:
            if _fits(kept, name, left[name]):
                setattr(kept, name, left.pop(name))
    model.generation_config = kept
    return sorted(left)


def _is_valid(config: Any) -> bool:
    """Whether transformers writes a generation_config."""
    try:
        config.validate(strict=True)
    except (ValueError, TypeError):
        return False
    return True


def _fits(config: Any, name: str, value: Any) -> bool:
    """Whether a generation_config stays valid with one value more."""
    more = copy.deepcopy(config)
    setattr(more, name, value)
    return _is_valid(more)


def _reset(config: Any, name: str, default: Any) -> None:
    """Gives a value its default, or takes away one that has none."""
    if hasattr(default, name):
        setattr(config, name, getattr(default, name))
    else:
        delattr(config, name)
