"""The protocol of rollout engines: load weights under a version, generate with exactly that version.

Letters: B prompts, n rollouts a prompt, L longest response in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from mgrpo.errors import EngineError, StaleWeightsError
from mgrpo.types import Rollouts, Sampling, Source

Shapes = Mapping[str, tuple[int, ...]]


def check_weights(weights: Mapping[str, torch.Tensor], shapes: Shapes) -> None:
    """EngineError unless the weights hold every tensor of the model, in its shape."""
    for name, shape in shapes.items():
        if name not in weights:
            raise EngineError(f"load: weights must hold every tensor of the model, {name} is missing.")
        if (found := tuple(weights[name].shape)) != shape:
            raise EngineError(f"load: {name} must have shape {shape}, got {found}.")


def check_loaded(loaded: tuple[Source, int] | None, source: Source, version: int) -> None:
    """StaleWeightsError unless an engine holds the weights that are asked for."""
    if loaded != (source, version):
        raise StaleWeightsError(f"generate: weights must be {source} version {version}, got {loaded}. Load them first.")


class Engine(Protocol):
    """Generates rollouts. One set of weights at a time; loading says whose and which version they are."""

    def load(self, weights: Mapping[str, torch.Tensor], *, source: Source, version: int) -> None:
        """Takes over a full state dict. The tensors must not change until the next load."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, *, source: Source, version: int
    ) -> Rollouts:
        """Samples n responses a prompt; raises StaleWeightsError unless source and version are the loaded ones."""
        ...


Weights = Sequence[tuple[str, torch.Tensor]]
