"""How large a model is, from its configuration alone."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig


def count_parameters(model_config: PretrainedConfig, *, trust_remote_code: bool) -> int | None:
    """Parameters of the model that a configuration describes; None where that takes the model itself."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
        return sum(p.numel() for p in model.parameters())
    except Exception:  # loading says what is wrong, if it is
        return None


def cache_numbers(text: PretrainedConfig) -> int:
    """Numbers that a KV cache holds a token, in all layers; 0 of a model without attention heads.

    Layers of another kind hold a state, which does not grow with the tokens.
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
    """A positive whole number of a configuration, the largest where each layer has one; None where there is none."""
    value = getattr(text, name, None)
    if isinstance(value, list | tuple) and value and all(type(entry) is int for entry in value):
        value = max(value)
    return value if type(value) is int and value > 0 else None
