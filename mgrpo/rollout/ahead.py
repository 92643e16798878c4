"""Rollouts of the next step, sampled while this one trains.

At step k the engine gets the weights of both models as they are before the update, and samples the rollouts of step
k + 1 with them. Every batch is used, in its order: dropping slow ones would favour short answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from mgrpo.data.prompts import Dataset, Prompt
from mgrpo.data.sampler import Sampler
from mgrpo.errors import ConfigError, EngineError
from mgrpo.observe.timer import Timer
from mgrpo.rollout.generator import Generator, Tags
from mgrpo.rollout.source import RolloutBatch, RolloutSource, Tensors
from mgrpo.types import Metrics, TrajectoryBatch

TENSORS = ("tokens", "mask", "rollout_logprob", "truncated")  # of a TrajectoryBatch


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A batch that is generated in the background."""

    batch: Future[RolloutBatch]
    place: dict[str, int]  # of the sampler before the prompts of the batch


class RolloutsAhead(RolloutSource):
    """Returns the batch that was started a step before and starts the next one; the first is generated at once.

    Weights are replaced in `next` only, when no batch is in flight. The greedy responses are by the policy that
    generates the batch. After the last step of the run none is started.

    Args:
        data, sampler, generator, requests: as in RolloutsNow; the engine must have a slot for each model.
        check: compares the engine's log-probs with the trainer's before a batch is started, given its step and a
            function that samples; returns metrics of the batch.
        timer: times `rollout`, the wait for a batch, and `publish`.
        last_step: of the run.
    """

    def __init__(
        self,
        data: Dataset,
        sampler: Sampler,
        generator: Generator,
        *,
        requests: Callable[[int, Sequence[int]], Sequence[int]],
        check: Callable[[int, Callable[[], TrajectoryBatch]], Metrics],
        timer: Timer,
        last_step: int,
    ):
        engine = generator.engine
        if engine.weights_are_shared or engine.num_weight_slots < len(generator.counts):
            raise ConfigError(["config: --rollout.ahead 1 needs an engine with own weights of both models."])
        self.data, self.sampler, self.generator, self.requests = data, sampler, generator, requests
        self.check, self.timer, self.last_step = check, timer, last_step
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._current: Flight | None = None  # of the last `next`
        self._flight: Flight | None = None  # of the step after

    def next(self, step: int) -> RolloutBatch:
        """See RolloutSource; also EngineError where the engine failed in the background."""
        self._current, self._flight = self._flight, None
        if self._current is None:
            self._current = self._start(step)
        with self.timer("rollout"):
            batch = self._current.batch.result()
        if step < self.last_step:
            self._flight = self._start(step + 1)
        return batch

    def _start(self, step: int) -> Flight:
        """Draws the prompts of a step, updates the engine and starts to generate."""
        place = self.sampler.state_dict()
        indices = self.sampler.next()
        prompts, asked = self._prompts(indices), self._prompts(self.requests(step, indices))
        try:
            tags = self.generator.publish()
            # The draws of a prompt do not depend on the others, so these are the first rollouts of the batch.
            first = [prompts[0].ids]
            metrics = self.check(step, lambda: self.generator.sample(first, step, tags, Timer()))
        except EngineError:
            self.sampler.load_state_dict(place)
            raise
        return Flight(batch=self._pool.submit(self._generate, step, prompts, asked, tags, metrics), place=place)

    def _generate(
        self, step: int, prompts: list[Prompt], asked: list[Prompt], tags: Tags, metrics: Metrics
    ) -> RolloutBatch:
        """In the background: the rollouts of a step."""
        timer = Timer()
        trajectories = self.generator.sample([prompt.ids for prompt in prompts], step, tags, timer)
        return RolloutBatch(
            step=step,
            prompts=prompts,
            trajectories=trajectories,
            asked=asked,
            replies=self.generator.answer([prompt.ids for prompt in asked], trajectories.version),
            metrics=metrics | dict(self.generator.engine.stats()) | timer.phases(),
        )

    def _prompts(self, indices: Sequence[int]) -> list[Prompt]:
        return [self.data.prompts[i] for i in indices]

    def undo(self) -> None:
        """See RolloutSource. A batch that `next` has returned is in flight again, as it was before."""
        self.drop()
        self._flight, self._current = self._current, None
        if self._flight and self._flight.batch.exception():
            self.drop()

    def settle(self) -> None:
        """See RolloutSource. The sampler goes back to before a batch that has failed."""
        if self._flight is None:
            return
        with self.timer("rollout"):
            wait([self._flight.batch])
        if self._flight.batch.exception():
            self.sampler.load_state_dict(self._flight.place)

    def drop(self) -> None:
        """See RolloutSource; waits until the engine is idle."""
        self.settle()
        if self._flight is not None:
            self.sampler.load_state_dict(self._flight.place)
        self._flight = None

    def state(self) -> tuple[dict[str, Any] | None, Tensors]:
        """See RolloutSource."""
        self.settle()
        if self._flight is None or self._flight.batch.exception():
            return None, {}
        batch = self._flight.batch.result()
        t = batch.trajectories
        state = {
            "step": batch.step,
            "place": self._flight.place,
            "prompts": [prompt.index for prompt in batch.prompts],
            "asked": [prompt.index for prompt in batch.asked],
            "replies": batch.replies,
            "metrics": batch.metrics,
            "num_policy": t.num_policy,
            "version": t.version,
        }
        return state, {name: getattr(t, name) for name in TENSORS}

    def restore(self, state: dict[str, Any] | None, tensors: Tensors) -> None:
        """See RolloutSource."""
        self.drop()
        if state is None:
            return
        prompts = self._prompts(state["prompts"])
        trajectories = TrajectoryBatch(
            prompts=[prompt.ids for prompt in prompts],
            num_policy=state["num_policy"],
            version=state["version"],
            **tensors,
        )
        done: Future[RolloutBatch] = Future()
        done.set_result(
            RolloutBatch(
                step=state["step"],
                prompts=prompts,
                trajectories=trajectories,
                asked=self._prompts(state["asked"]),
                replies=state["replies"],
                metrics=state["metrics"],
            )
        )
        self._flight = Flight(batch=done, place=state["place"])

    def close(self) -> None:
        """See RolloutSource."""
        self._pool.shutdown(cancel_futures=True)
