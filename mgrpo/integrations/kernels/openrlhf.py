"""OpenRLHF's log-probs and entropies by our kernels. Letters: V vocabulary."""

from __future__ import annotations

import importlib

from torch import Tensor

from mgrpo.integrations.kernels.rows import token_logprob
from mgrpo.integrations.patching import Replacement, replace_everywhere
from mgrpo.integrations.versions import require


def kernel_patches() -> list[Replacement]:
    """Replacements in OpenRLHF: two functions, in every module that imports them by name.

    Raises:
        UnsupportedVersion: OpenRLHF is missing or its version unsupported.
    """
    require("openrlhf")
    utils = importlib.import_module("openrlhf.models.utils")
    importlib.import_module("openrlhf.models.actor")  # it imports both by name
    return [
        *replace_everywhere(utils.log_probs_from_logits, log_probs_from_logits, "openrlhf"),
        *replace_everywhere(utils.compute_entropy, compute_entropy, "openrlhf"),
    ]


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log softmax(logits / temperature) at the labels [...], fp32; logits [..., V] are not changed."""
    return token_logprob(logits, labels, temperature=temperature)[0]


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each row of logits [..., V], fp32."""
    return token_logprob(logits)[1]
