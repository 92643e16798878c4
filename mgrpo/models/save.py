"""Writes models and tokenizers in the transformers layout, and checks beforehand that it can."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mgrpo.distributed.sharding import local
from mgrpo.errors import InputError, StorageError, whole


def save_model(folder: Path, model: Any, weights: dict[str, torch.Tensor], tokenizer: Any) -> None:
    """Writes weights in the transformers layout, loadable by AutoModelForCausalLM."""
    model.should_save_on_this_rank = bool  # of `is_main_process`, True; transformers would write on rank 0 alone
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def try_save(folder: Path, model: Any, weights: Mapping[str, Mapping[str, torch.Tensor]], tokenizer: Any) -> None:
    """Tries `save_model` with only the first column of each weight, which takes little space.

    Args:
        folder: an empty folder.
        model: its configuration is written.
        weights: state dicts by the name of their folder. Names and shared memory are as in a real save.
        tokenizer: written once.

    Raises:
        InputError: transformers refuses to write the model or the tokenizer.
        StorageError: the disk refuses the write.
    """
    with saving(folder):
        for name, tensors in weights.items():
            thin = {key: _first_column(tensor) for key, tensor in tensors.items()}
            try:
                model.save_pretrained(folder / name, state_dict=thin)
            except Exception as error:
                if is_of_storage(error):
                    raise
                # Some layouts need whole tensors; a model that cannot be saved fails with them too.
                model.save_pretrained(folder / name, state_dict=whole_or_zeros(tensors))
        tokenizer.save_pretrained(folder / next(iter(weights)))


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Turns every error of a trial save into StorageError, or into InputError where the disk is not its cause."""
    try:
        yield
    except Exception as error:
        if is_of_storage(error):
            raise StorageError(f"run: {folder.parent} must take what is written, got: {whole(error)}.") from error
        raise InputError(f"model: the model must be savable, saving failed with: {whole(error)}.") from error


def whole_or_zeros(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as they are, and zeros in the shape of those that are sharded."""
    return {name: t if local(t) is t else torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items()}


def _first_column(tensor: torch.Tensor) -> torch.Tensor:
    """The first column of a weight; zeros in its shape for one that is sharded."""
    if local(tensor) is not tensor:
        return torch.zeros(*tensor.shape[:-1], 1, dtype=tensor.dtype)
    return tensor[..., :1] if tensor.ndim else tensor


def is_of_storage(error: Exception) -> bool:
    """Whether the disk caused an error; tokenizers and safetensors say so only in the message."""
    return (isinstance(error, OSError) and error.errno is not None) or "(os error " in str(error)


def make_savable(model: Any) -> list[str]:
    """Resets the values of a model's generation_config that transformers refuses to write; returns their names.

    Examples are sampling values without `do_sample`, which transformers loads with a warning and does not save.
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
    # Repeated, because one value may need another: temperature is valid only after do_sample.
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
    """Whether a generation_config stays valid with one more value."""
    more = copy.deepcopy(config)
    setattr(more, name, value)
    return _is_valid(more)


def _reset(config: Any, name: str, default: Any) -> None:
    """Sets a value to its default, or removes one without a default."""
    if hasattr(default, name):
        setattr(config, name, getattr(default, name))
    else:
        delattr(config, name)
