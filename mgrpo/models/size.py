"""Size of a model, from its configuration alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from mgrpo.models.adapter import Adapter

if TYPE_CHECKING:
    from peft import LoraConfig as PeftConfig


def count_trained(model_config: PretrainedConfig, adapter: PeftConfig, *, trust_remote_code: bool) -> int | None:
    """Number of parameters of an adapter of that model; raises ConfigError for targets that it does not have."""
    model = _without_weights(model_config, trust_remote_code=trust_remote_code)
    if model is None:
        return None
    Adapter(model, copy.deepcopy(adapter), seed=0, trained=False)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _without_weights(model_config: PretrainedConfig, *, trust_remote_code: bool) -> Any:
    """The model that a configuration describes, on the meta device; None if it cannot be built from that alone."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
    except Exception:  # loading the model reports any error
        return None


def cache_numbers(text: PretrainedConfig) -> int:
    """Numbers that a KV cache holds for a token in all layers; 0 for a model without attention heads.

    Recurrent layers hold a state that does not grow with the tokens.
    """
    heads = positive(text, "num_attention_heads")
    width = positive(text, "hidden_size")
    if not heads or not (head_dim := positive(text, "head_dim") or (width or 0) // heads):
        return 0
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if isinstance(kinds, list | tuple):
        layers = sum("attention" in str(kind) and "linear" not in str(kind) for kind in kinds)
    else:
        layers = positive(text, "num_hidden_layers") or 0
    return 2 * layers * (positive(text, "num_key_value_heads") or heads) * head_dim


def positive(text: PretrainedConfig, name: str) -> int | None:
    """A positive integer of a configuration, the largest of all layers; None if there is none."""
    value = getattr(text, name, None)
    if isinstance(value, list | tuple) and value and all(type(entry) is int for entry in value):
        value = max(value)
    return value if type(value) is int and value > 0 else None
