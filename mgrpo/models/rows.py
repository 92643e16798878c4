"""Loads a model by rows: each rank reads its shard from the files, and no rank ever holds the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from mgrpo.distributed.sharding import fill, local
from mgrpo.errors import InputError
from mgrpo.models.files import GENERATION, INDEX, WEIGHTS


def open_tensors(*files: Path | str) -> dict[str, Any]:
    """The tensors of safetensors files by name, of which rows are read only as `tensor[start:end]`.

    Scalars, which have no rows, are read at once.
    """
    found: dict[str, Any] = {}
    for file in files:
        content = safe_open(str(file), "pt")
        for name in content.keys():
            rows = content.get_slice(name)
            found[name] = rows if rows.get_shape() else content.get_tensor(name)
    return found


def find_files(path: str | Path) -> list[str]:
    """The safetensors files of a folder or hub id, which are fetched; empty if there are none."""
    name, options = str(path), {"_raise_exceptions_for_missing_entries": False}
    if (file := cached_file(name, WEIGHTS, **options)) is not None:
        return [file]
    if (index := cached_file(name, INDEX, **options)) is not None:
        return get_checkpoint_shard_files(name, index)[0] or []
    return []


def empty_model(
    path: str | Path, config: PretrainedConfig, *, attention: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The model of a configuration in fp32, on the CPU, whose weights take no memory before they are written."""
    options: dict[str, Any] = {"attn_implementation": attention, "trust_remote_code": trust_remote_code}
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    model.tie_weights()
    if cached_file(str(path), GENERATION, _raise_exceptions_for_missing_entries=False) is not None:
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def match(tensors: Mapping[str, Any], targets: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
    """The tensor of a file for each name of a state dict; None if one is missing or has another shape.

    Of a tied weight the files need one of the names.
    """
    found = {id(target): tensors[name] for name, target in targets.items() if name in tensors}
    for target in targets.values():
        tensor = found.get(id(target))
        shape = None if tensor is None else tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape()
        if shape is None or tuple(shape) != tuple(target.shape):
            return None
    return {name: found[id(target)] for name, target in targets.items()}


def fill_rows(targets: Mapping[str, torch.Tensor], tensors: Mapping[str, Any], path: str) -> None:
    """Reads this rank's rows into sharded tensors; raises InputError for NaN or infinity in them."""
    for name, target in {id(target): (name, target) for name, target in targets.items()}.values():
        fill(target, tensors[name])
        refuse_nonfinite(name, local(target), path)


def refuse_nonfinite(name: str, tensor: torch.Tensor, path: str) -> None:
    """Raises InputError for a weight that holds NaN or infinity."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise InputError(f"model: {name} of {path} must be finite, got NaN or infinity. The folder is damaged.")
