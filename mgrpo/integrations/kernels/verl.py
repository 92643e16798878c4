"""verl's log-probs and entropies by our kernels.

Letters: D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mgrpo.integrations.kernels.rows import linear_token_logprob, token_logprob
from mgrpo.integrations.patching import Replacement, replace_everywhere
from mgrpo.integrations.versions import require


def kernel_patches() -> list[Replacement]:
    """Replacements in verl: functions of whole logits under each name they have, and the fused head.

    An engine keeps the entropy function of the time when it was built, so patch before.

    Raises:
        UnsupportedVersion: verl is missing or its version unsupported.
    """
    require("verl")
    functional = importlib.import_module("verl.utils.torch_functional")
    fused = importlib.import_module("verl.utils.experimental.torch_functional")
    # These import the functions by name, so they must be imported before; the second needs a package of its own.
    importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    if importlib.util.find_spec("prefix_grouper") is not None:
        importlib.import_module("verl.trainer.ppo.prefix_grouper_utils")
    head = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    return [
        *replace_everywhere(functional.logprobs_from_logits, logprobs_from_logits, "verl"),
        *replace_everywhere(functional.entropy_from_logits, entropy_from_logits, "verl"),
        *replace_everywhere(functional.entropy_from_logits_with_chunking, entropy_from_logits_with_chunking, "verl"),
        Replacement(fused.FusedLinearForPPO, "forward", fused_forward),
        *replace_everywhere(head.linear_cross_entropy, make_linear_cross_entropy(head.linear_cross_entropy), "verl"),
    ]


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log softmax(logits) at labels, fp32; logits [..., V], labels [...].

    With `inplace_backward` the gradient overwrites the logits, as in verl with flash-attention.
    """
    # A leaf must not be written in place.
    inplace = inplace_backward and logits.requires_grad and not logits.is_leaf
    return token_logprob(logits, labels, inplace_backward=inplace)[0]


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of each row of logits [..., V], fp32."""
    return token_logprob(logits)[1]


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """As `entropy_from_logits`; `chunk_size` is ignored."""
    return entropy_from_logits(logits)


def fused_forward(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [...] of hidden [..., D] under weight [V, D], without the logits; `self` is not read."""
    return linear_token_logprob(hidden_states, vocab_weights, input_ids, temperature=temperature)


def make_linear_cross_entropy(original: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement of verl's Triton head; calls `original` for what ours lacks."""

    def linear_cross_entropy(*args: Any, **kwargs: Any) -> Any:
        """Takes hidden, weight, labels, temperature, reduction and process group, as `original` does."""

        def ours(
            hidden: Tensor,
            weight: Tensor,
            labels: Tensor,
            temperature: float = 1.0,
            reduction: str = "none",
            dist_process_group: Any = None,
        ) -> Any:
            # With a sharded vocabulary, hidden states and gradients have Megatron's layout.
            if reduction != "none" or dist_process_group is not None:
                return original(hidden, weight, labels, temperature, reduction, dist_process_group)
            # Flat, like the original's.
            return linear_token_logprob(hidden, weight, labels.flatten(), temperature=temperature)

        return ours(*args, **kwargs)

    return linear_cross_entropy
