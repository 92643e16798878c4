"""Options of the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mgrpo.config.option import HomeText


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy."""

    path: HomeText = "builtin:arithmetic"
    """Folder or hub id of a transformers causal LM; `builtin:arithmetic` is the base model shipped with the package."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of forward passes and rollouts. Master weights and optimiser state are always fp32."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers. Families without `sdpa` use `eager`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Allow a model folder to run its own code."""
    device: str = "auto"
    """Device: `auto` is a GPU if there is one; or `cpu`, `cuda`, `cuda:1`."""
