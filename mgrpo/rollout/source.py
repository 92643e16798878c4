"""Sources of a step's rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mgrpo.data.prompts import Dataset, Prompt
from mgrpo.data.sampler import Sampler
from mgrpo.observe.timer import Timer
from mgrpo.rollout.generator import Generator
from mgrpo.types import Metrics, TrajectoryBatch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """The rollouts of one step, and greedy responses to other prompts."""

    step: int
    prompts: list[Prompt]  # B
    trajectories: TrajectoryBatch
    asked: list[Prompt]
    replies: list[list[int]]  # token ids, one response to each prompt of `asked`
    metrics: Metrics  # of the engine, and of a generation in the background


class RolloutSource(Protocol):
    """Provides the rollouts of a step, and between steps may have those of the next one in flight."""

    def next(self, step: int) -> RolloutBatch:
        """The rollouts of step `step`, from 1; EngineError where the engine fails."""
        ...

    def undo(self) -> None:
        """Takes the last `next` back, whether it failed or not, so that the step can be repeated."""
        ...

    def settle(self) -> None:
        """Waits for the batch in flight, so that the engine's weights may be replaced; its error comes with `next`."""

    def drop(self) -> None:
        """Forgets the batch in flight; its prompts are the next to be drawn."""

    def state(self) -> tuple[dict[str, Any] | None, Tensors]:
        """The batch in flight, once it is there, as JSON and tensors; None without one, or if it failed."""
        return None, {}

    def restore(self, state: dict[str, Any] | None, tensors: Tensors) -> None:
        """Replaces the batch in flight by what `state` returned."""

    def close(self) -> None:
        """Ends the generation; the engine must be closed before."""


class RolloutsNow(RolloutSource):
    """Generates rollouts when they are asked for, with the weights of the step itself.

    Args:
        data: prompts.
        sampler: draws the prompts of a step.
        generator: generates the rollouts.
        requests: indices of the prompts to answer greedily, given a step and the indices of its own prompts.
        timer: times `rollout`, `monitor` (the greedy responses) and `publish`.
    """

    def __init__(
        self,
        data: Dataset,
        sampler: Sampler,
        generator: Generator,
        *,
        requests: Callable[[int, Sequence[int]], Sequence[int]],
        timer: Timer,
    ):
        self.data, self.sampler, self.generator, self.requests, self.timer = data, sampler, generator, requests, timer

    def next(self, step: int) -> RolloutBatch:
        """See RolloutSource. The engine sleeps once everything is generated."""
        self._place = self.sampler.state_dict()
        indices = self.sampler.next()
        prompts = [self.data.prompts[i] for i in indices]
        with self.timer("rollout"):
            trajectories = self.generator.roll_out([prompt.ids for prompt in prompts], step)
        with self.timer("monitor"):
            asked = [self.data.prompts[i] for i in self.requests(step, indices)]
            replies = self.generator.answer([prompt.ids for prompt in asked], trajectories.version)
        metrics = dict(self.generator.engine.stats())
        with self.timer("publish"):
            self.generator.engine.sleep()
        return RolloutBatch(
            step=step, prompts=prompts, trajectories=trajectories, asked=asked, replies=replies, metrics=metrics
        )

    def undo(self) -> None:
        """See RolloutSource."""
        self.sampler.load_state_dict(self._place)
