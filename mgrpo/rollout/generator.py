"""Rollouts of both models by one engine: the order of weight updates and generation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from mgrpo.config import RolloutConfig
from mgrpo.observe.timer import Timer
from mgrpo.rollout.engine import Engine
from mgrpo.types import Rollouts, Sampling, Source, TrajectoryBatch, WeightTag, join

Prompts = Sequence[Sequence[int]]
Tags = Mapping[Source, WeightTag]


class Generator:
    """Generates rollouts of the momentum model and then of the policy.

    An engine with one slot gets each model's weights before its rollouts; with two it holds both models, which generate
    concurrently.

    Args:
        engine: the engine.
        config: numbers of rollouts and sampling.
        weights: returns a source's state dict for the engine, and its tag.
        seed: of the run.
        timer: times `publish`, the updates of weights, and `rollout_SOURCE`.
    """

    def __init__(
        self,
        engine: Engine,
        config: RolloutConfig,
        *,
        weights: Callable[[Source], tuple[Mapping[str, torch.Tensor], WeightTag]],
        seed: int,
        timer: Timer,
    ):
        self.engine, self.config, self.weights, self.seed, self.timer = engine, config, weights, seed, timer
        counts: dict[Source, int] = {"momentum": config.num_momentum, "policy": config.num_policy}
        self.counts: dict[Source, int] = {source: n for source, n in counts.items() if n}  # rollouts a prompt

    def update_weights(self, source: Source) -> WeightTag:
        """Updates the engine with a source's current weights; returns their tag."""
        weights, tag = self.weights(source)
        with self.timer("publish"):
            self.engine.update_weights(weights, tag)
        return tag

    def roll_out(self, prompts: Prompts, step: int) -> TrajectoryBatch:
        """N momentum rollouts and M policy rollouts of each of B prompts, as token ids."""
        if self.engine.num_weight_slots > 1:
            return self.sample(prompts, step, self.publish(), self.timer)
        found = {
            source: self._sample(prompts, n, step, self.update_weights(source), self.timer)
            for source, n in self.counts.items()
        }
        return join(prompts, found["policy"], found.get("momentum"))

    def publish(self) -> Tags:
        """Updates an engine that has a slot for each model; returns the tags of the weights that it holds."""
        return {source: self.update_weights(source) for source in self.counts}

    def sample(self, prompts: Prompts, step: int, tags: Tags, timer: Timer) -> TrajectoryBatch:
        """See roll_out; under weights that the engine holds, of both models concurrently."""
        with ThreadPoolExecutor(len(tags)) as pool:
            asked = {s: pool.submit(self._sample, prompts, self.counts[s], step, tag, timer) for s, tag in tags.items()}
        found = {source: future.result() for source, future in asked.items()}
        return join(prompts, found["policy"], found.get("momentum"))

    def answer(self, prompts: Prompts, version: int) -> list[list[int]]:
        """Greedy responses of the policy of a version, whose weights the engine must hold."""
        if not prompts:
            return []
        sampling = Sampling(temperature=0.0, max_new_tokens=self.config.max_new_tokens)
        rollouts = self.engine.generate(prompts, 1, sampling, WeightTag("policy", version))
        return [rollouts.response(row) for row in range(len(prompts))]

    def sampling(self, step: int, stream: str) -> Sampling:
        """Sampling options of one stream of draws at a step."""
        c = self.config
        return Sampling(
            temperature=c.temperature,
            top_p=c.top_p,
            max_new_tokens=c.max_new_tokens,
            seed=derive_seed(self.seed, step, stream),
        )

    def _sample(self, prompts: Prompts, n: int, step: int, tag: WeightTag, timer: Timer) -> Rollouts:
        """N rollouts a prompt under weights that the engine holds."""
        with timer(f"rollout_{tag.source}"):
            return self.engine.generate(prompts, n, self.sampling(step, tag.source), tag)


def derive_seed(seed: int, step: int, stream: str) -> int:
    """A separate seed for every step and stream of draws."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{stream}".encode()).digest()[:6])
