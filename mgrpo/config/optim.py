"""Options of the optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mgrpo.config.option import option


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW on fp32 master weights."""

    lr: float = option(1e-6, least=0)
    """Peak learning rate."""
    warmup_ratio: float = option(0.1, least=0, below=1)
    """Share of the optimiser steps spent on linear warm-up."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up; `cosine` falls to zero."""
    weight_decay: float = option(0.0, least=0)
    """Decoupled weight decay of matrices."""
    beta1: float = option(0.9, least=0, below=1)
    """Decay of the first moment."""
    beta2: float = option(0.999, least=0, below=1)
    """Decay of the second moment."""
    grad_clip: float = option(1.0, above=0, most=math.inf)
    """Largest gradient norm."""
    micro_batch_tokens: int = option(16384, least=1)
    """Most tokens in one forward pass, padding included; changes memory and time, not the gradient."""
    packing: Literal["padded", "packed"] = "padded"
    """Sequences of a forward pass padded to one length, or one behind the other in a single row (for flash-attn; the
    other implementations then build a mask of tokens x tokens)."""
    num_minibatches: int = option(1, least=1)
    """Optimiser steps a pass over the rollout batch."""
    num_epochs: int = option(1, least=1)
    """Passes over the rollout batch."""
    offload: bool = False
    """AdamW's moments and its step on the host: 8 bytes a parameter less on a GPU, and more time for each optimiser
    step. On a CPU nothing changes. One process only."""
    max_nonfinite: int = option(5, least=1)
    """Non-finite optimiser steps in a row that stop the run."""
