"""The protocol of rollout engines: weights are updated under a tag, and rollouts are generated with exactly those.

Letters: B prompts, n rollouts a prompt, L longest response in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from mgrpo.distributed.exchange import like
from mgrpo.errors import EngineError, StaleWeightsError
from mgrpo.types import Rollouts, Sampling, WeightTag

Shapes = Mapping[str, tuple[int, ...]]


class Engine(Protocol):
    """Generates rollouts with the weights of its last update, which a tag names."""

    num_weight_slots: int = 1
    """Sets of weights held at once: 1, or 2 for policy and momentum, which then generate concurrently."""
    weights_are_shared: bool = False
    """Whether the engine generates with the caller's own tensors, so that an update sends nothing."""
    has_model_logprobs: bool = True
    """Whether the engine's log-probs are the model's, so that they can be compared with the trainer's."""

    def update_weights(self, weights: Mapping[str, torch.Tensor], tag: WeightTag) -> None:
        """Replaces the weights by a full state dict. Shared tensors must not change until the next update.

        With several ranks weights may be sharded, and every rank calls it: distributed/exchange.py gathers them.
        """
        ...

    def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, tag: WeightTag) -> Rollouts:
        """Samples n responses to each of B prompts; raises StaleWeightsError unless it holds the weights of `tag`."""
        ...

    def parts(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Indices of prompts by the copy of the weights that generates them."""
        return [list(range(len(prompts)))]

    def sleep(self) -> None:
        """Frees memory until the next update, if the engine can."""

    def close(self) -> None:
        """Frees the engine's memory and ends its processes."""

    def stats(self) -> Mapping[str, float | None]:
        """The engine's own metrics, by key."""
        return {}


def check_weights(weights: Mapping[str, torch.Tensor], shapes: Shapes) -> None:
    """Raises EngineError unless the weights hold every tensor of the model, in its shape."""
    for name, shape in shapes.items():
        if name not in weights:
            raise EngineError(f"update_weights: weights must hold every tensor of the model, {name} is missing.")
        if (found := tuple(like(weights, name).shape)) != shape:
            raise EngineError(f"update_weights: {name} must have shape {shape}, got {found}.")


def check_tag(held: WeightTag | None, tag: WeightTag) -> None:
    """Raises StaleWeightsError unless the weights that an engine holds are those of `tag`."""
    if held != tag:
        raise StaleWeightsError(
            f"generate: weights must be {tag.source} version {tag.version}, got {held and tuple(held)}. "
            "Call update_weights first."
        )
