"""Sources of a step's rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mgrpo.data.prompts import Dataset, Prompt
from mgrpo.data.sampler import Sampler
from mgrpo.observe.timer import Timer
from mgrpo.rollout.generator import Generator
from mgrpo.types import TrajectoryBatch


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """The rollouts of one step, and greedy responses to other prompts."""

    step: int
    prompts: list[Prompt]  # B
    trajectories: TrajectoryBatch
    asked: list[Prompt]
    replies: list[list[int]]  # token ids, one response to each prompt of `asked`


class RolloutSource(Protocol):
    """Provides the rollouts of a step."""

    def next(self, step: int) -> RolloutBatch:
        """The rollouts of step `step`, from 1; EngineError where the engine fails."""
        ...


class RolloutsNow:
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
        indices = self.sampler.next()
        prompts = [self.data.prompts[i] for i in indices]
        with self.timer("rollout"):
            trajectories = self.generator.roll_out([prompt.ids for prompt in prompts], step)
        with self.timer("monitor"):
            asked = [self.data.prompts[i] for i in self.requests(step, indices)]
            replies = self.generator.answer([prompt.ids for prompt in asked])
        with self.timer("publish"):
            self.generator.engine.sleep()
        return RolloutBatch(step=step, prompts=prompts, trajectories=trajectories, asked=asked, replies=replies)
