"""The protocol of rollout engines: take weights under a tag, generate with exactly those.

Letters: B prompts, n rollouts a prompt, L longest response in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from mgrpo.errors import EngineError, StaleWeightsError
from mgrpo.types import Rollouts, Sampling, WeightTag

Shapes = Mapping[str, tuple[int, ...]]
Weights = Sequence[tuple[str, torch.Tensor]]


class Engine(Protocol):
    """Generates rollouts under the weights that it was handed, which a tag names."""

    num_weight_slots: int = 1
    """Sets of weights that it holds at once: 1, or 2 for policy and momentum, which then generate together."""
    weights_are_shared: bool = False
    """Whether it generates with the caller's own tensors, so that there is nothing to send."""
    has_model_logprobs: bool = True
    """Whether its log-probs are the model's, so that they can be held against the trainer's."""

    def update_weights(self, weights: Mapping[str, torch.Tensor], tag: WeightTag) -> None:
        """Takes over a full state dict. Shared tensors must not change until the next update."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, tag: WeightTag) -> Rollouts:
        """Samples n responses to each of B prompts; raises StaleWeightsError unless it holds the weights of `tag`."""
        ...

    def sleep(self) -> None:
        """Gives back what memory it can until the next update."""

    def close(self) -> None:
        """Frees its memory and ends what it started."""

    def stats(self) -> Mapping[str, float | None]:
        """Metrics of its own, by key."""
        return {}


def check_weights(weights: Mapping[str, torch.Tensor], shapes: Shapes) -> None:
    """EngineError unless the weights hold every tensor of the model, in its shape."""
    for name, shape in shapes.items():
        if name not in weights:
            raise EngineError(f"load: weights must hold every tensor of the model, {name} is missing.")
        if (found := tuple(weights[name].shape)) != shape:
            raise EngineError(f"load: {name} must have shape {shape}, got {found}.")


def check_tag(held: WeightTag | None, tag: WeightTag) -> None:
    """StaleWeightsError unless the weights that an engine holds are those that are asked for."""
    if held != tag:
        raise StaleWeightsError(
            f"generate: weights must be {tag.source} version {tag.version}, got {held and tuple(held)}. "
            "Load them first."
        )
