"""OpenRLHF's log-probs and entropies by our kernels. Letters: V vocabulary."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

import mgrpo_kernels as K
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
    result = K.token_logprob(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), temperature=temperature)
    return result.logprob.view(labels.shape)


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each row of logits [..., V], fp32."""
    rows = logits.reshape(-1, logits.shape[-1])
    targets = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    return K.token_logprob(rows, targets).entropy.view(logits.shape[:-1])
