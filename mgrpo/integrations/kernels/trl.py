"""TRL's log-probs and entropies by our kernels.

Letters: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mgrpo.integrations.kernels.rows import linear_token_logprob, token_logprob
from mgrpo.integrations.patching import Replacement, replace_everywhere
from mgrpo.integrations.versions import require

OURS = {"entropy"}  # outputs of the fused head besides the log-probs


def kernel_patches() -> list[Replacement]:
    """Replacements in TRL: the fused head of its trainers, and the functions of whole logits.

    Raises:
        UnsupportedVersion: TRL is missing or its version unsupported.
    """
    require("trl")
    utils = importlib.import_module("trl.trainer.utils")
    # The trainers import these by name, so their modules must be imported before.
    for name in ("grpo_trainer", "rloo_trainer", "dpo_trainer"):
        importlib.import_module(f"trl.trainer.{name}")
    return [
        Replacement(utils, "_ChunkedLogProbFunction", make_fused_head(utils._ChunkedLogProbFunction)),
        # The module uses this only to choose log-probs of labelled positions alone, which ours do on every device.
        Replacement(utils, "_use_triton", lambda device: True),
        *replace_everywhere(utils.selective_log_softmax, make_selective(utils.selective_log_softmax), "trl"),
        *replace_everywhere(utils.entropy_from_logits, entropy_from_logits, "trl"),
        *replace_everywhere(utils.selective_log_softmax_and_entropy, selective_log_softmax_and_entropy, "trl"),
    ]


def make_fused_head(original: Any) -> type:
    """A replacement of TRL's autograd function on hidden states; calls `original` for outputs that ours lacks."""

    class FusedHead:
        """Log-probs and entropies of hidden weight^T, without the logits, by `linear_token_logprob`."""

        @staticmethod
        def apply(
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = ("entropy",),
        ) -> tuple[Any, ...]:
            """[T] log-probs and, where `outputs` asks for it, entropies of hidden [T, D] under weight [V, D]."""
            others = set(outputs) - OURS - {"log_probs"}
            # ZeRO-3 frees the weight between forward and backward, which only TRL's own function handles.
            if others or hasattr(weight, "ds_id") or logit_scale <= 0:
                head = (hidden, weight, bias, targets, temperature, chunk_size)
                return original.apply(*head, final_logit_softcapping, logit_scale, outputs)
            # Softcap c of s z is s times softcap c / s of z, and a factor of the logits divides the temperature.
            softcap = None if final_logit_softcapping is None else final_logit_softcapping / logit_scale
            options = {"temperature": temperature / logit_scale, "softcap": softcap}
            logprob, entropy = linear_token_logprob(hidden, weight, targets, bias=bias, **options)
            return logprob, entropy if "entropy" in outputs else None, None, None, None

    return FusedHead


def make_selective(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """TRL's `selective_log_softmax` by `token_logprob`; calls `original` for several indices a row."""

    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        """Log softmax(logits / temperature) at index; logits [..., V], index [...], zeros where row_mask is 0."""
        if index.ndim == logits.ndim:
            return original(logits, index, temperature=temperature, row_mask=row_mask)
        return _log_probs(logits, index, temperature, row_mask)[0]

    return selective_log_softmax


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy in nats of each row of logits [..., V]; `chunk_size` is ignored."""
    return token_logprob(logits)[1]


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both from one pass over logits [..., V], index [...]; zeros where row_mask is 0."""
    logprob, entropy = _log_probs(logits, index, temperature, row_mask)
    return logprob, entropy if entropy_requires_grad else entropy.detach()


def _log_probs(logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`token_logprob` of logits [..., V]."""
    if temperature <= 0:
        raise ValueError(f"selective_log_softmax: temperature must be positive, got {temperature}. Use 1.")
    mask = None if row_mask is None else (row_mask != 0).reshape(-1)
    return token_logprob(logits, index, temperature=temperature, mask=mask)
