"""The protocol of rollout engines: load weights under a version, generate with exactly that version.

Letters: B prompts, n rollouts a prompt, L longest response in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

Source = Literal["policy", "momentum"]


class EngineError(RuntimeError):
    """The rollout engine is dead or returned something impossible."""


class StaleWeightsError(EngineError):
    """The engine holds another version of the weights than the caller asked for."""


class ParityError(StaleWeightsError):
    """The engine's log-probs are not the model's: nothing of what it wrote can be trained on."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy; `seed` fixes every draw of one call."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """n rollouts of each of B prompts from one source; row b * n + i is rollout i of prompt b."""

    tokens: torch.Tensor  # [B * n, L] int64, padded on the right
    lengths: torch.Tensor  # [B * n] int64, EOS or the token that completes a stop text included
    logprobs: torch.Tensor  # [B * n, L] fp32 behaviour log-probs after temperature, 0 at padding
    truncated: torch.Tensor  # [B * n] bool, cut at max_new_tokens without either
    num_per_prompt: int  # n
    source: Source
    version: int  # of the weights that wrote them

    @property
    def mask(self) -> torch.Tensor:
        """[B * n, L] bool, True at response tokens."""
        return torch.arange(self.tokens.shape[1])[None] < self.lengths[:, None]

    def response(self, row: int) -> list[int]:
        """Token ids of one rollout, without padding."""
        return self.tokens[row, : int(self.lengths[row])].tolist()


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
