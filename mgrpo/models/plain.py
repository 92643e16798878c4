"""The plain forward pass of any causal LM: token ids to logits, without a cache, a mask or positions.

Letters: R sequences, L tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def accepted(model: PreTrainedModel) -> frozenset[str]:
    """Names of the forward pass's parameters."""
    return _accepted(type(model))


@lru_cache
def _accepted(model: type) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)  # pyright: ignore


def head_and_embedding(model: PreTrainedModel) -> tuple[torch.nn.Module | None, torch.Tensor | None]:
    """The head, and the weight of the input embedding; None where the model does not give them."""
    found: list[Any] = []
    for get in (model.get_output_embeddings, model.get_input_embeddings):
        try:
            found.append(get())
        except (AttributeError, NotImplementedError):  # transformers raises either if it finds no embedding
            found.append(None)
    return found[0], getattr(found[1], "weight", None)


def plain_options(model: PreTrainedModel) -> dict[str, Any]:
    """Options that keep a forward pass from filling a cache."""
    return {"use_cache": False} if "use_cache" in accepted(model) else {}


def plain_logits(model: PreTrainedModel, ids: torch.Tensor, *, last: bool = False, **options: Any) -> torch.Tensor:
    """Logits [R, L, V] of ids [R, L], or with `last` [R, V] after the last one."""
    if not last:
        return model(input_ids=ids, **plain_options(model), **options).logits
    keep = {"logits_to_keep": 1} if "logits_to_keep" in accepted(model) else {}
    return model(input_ids=ids, **plain_options(model), **keep).logits[:, -1]


def plain_hidden(decoder: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Last hidden states [R, L, D] of ids [R, L]."""
    return decoder(input_ids=ids, **plain_options(decoder), **options).last_hidden_state
