"""Engines of a run with several ranks: one on each, or one of rank 0 for all. All ranks get all rollouts.

Letters: W ranks, B prompts, n rollouts a prompt, L longest response in tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from mgrpo.config.distributed import LANES
from mgrpo.distributed.together import failing_together, on_first
from mgrpo.distributed.world import World
from mgrpo.errors import EngineError
from mgrpo.rollout.engine import Engine
from mgrpo.rollout.weights.sending import sending
from mgrpo.types import Rollouts, Sampling, WeightTag


class RankedEngine(Engine):
    """The engines of all ranks as one.

    Args:
        engine: this rank's engine, or its part of one.
        world: of the run.
        tree: generate in blocks of prompts that do not depend on W, so that the bits of log-probs do not either.
        parallel: consecutive ranks that are one engine; each of them gets the same prompts and returns all rollouts.
    """

    def __init__(self, engine: Engine, world: World, *, tree: bool, parallel: int = 1):
        self.engine, self.world = engine, world
        self.num_engines, self.index = world.size // parallel, world.rank // parallel
        self.speaks = world.rank % parallel == 0  # for its engine
        self.num_blocks = LANES if tree else self.num_engines
        self.num_weight_slots = engine.num_weight_slots
        self.weights_are_shared, self.has_model_logprobs = engine.weights_are_shared, engine.has_model_logprobs

    def update_weights(self, weights: Mapping[str, torch.Tensor], tag: WeightTag) -> None:
        """See Engine; every rank passes its shards. An error of any rank's engine is raised on all."""
        with failing_together(self.world):
            self.engine.update_weights(weights, tag)

    def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, tag: WeightTag) -> Rollouts:
        """See Engine; every rank passes the same prompts. An error of any rank's engine is raised on all."""
        num_rows, width = len(prompts) * n, sampling.max_new_tokens
        tokens, logprobs = torch.zeros(num_rows, width, dtype=torch.int64), torch.zeros(num_rows, width)
        lengths, truncated = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.int64)
        with failing_together(self.world):
            for block in filter(None, self._blocks(prompts)[self.index :: self.num_engines]):
                indices = tuple(sampling.index(b) for b in block)
                part = self.engine.generate([prompts[b] for b in block], n, replace(sampling, indices=indices), tag)
                if not self.speaks:
                    continue
                rows = (torch.tensor(block)[:, None] * n + torch.arange(n)).flatten()
                longest = part.tokens.shape[1]
                tokens[rows, :longest], logprobs[rows, :longest] = part.tokens, part.logprobs
                lengths[rows], truncated[rows] = part.lengths, part.truncated.long()
        for values in (tokens, logprobs, lengths, truncated):
            self.world.sum_(values)
        longest = int(lengths.max()) if num_rows else 0
        return Rollouts(
            tokens=tokens[:, :longest].clone(),
            lengths=lengths,
            logprobs=logprobs[:, :longest].clone(),
            truncated=truncated.bool(),
            num_per_prompt=n,
            tag=tag,
        )

    def parts(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """See Engine; each part is of one engine."""
        return [block for block in self._blocks(prompts) if block]

    def _blocks(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Blocks of prompts, dealt to the engines in turn; each has prompts of all lengths."""
        order = sorted(range(len(prompts)), key=lambda b: len(prompts[b]))
        return [order[k :: self.num_blocks] for k in range(self.num_blocks)]

    def sleep(self) -> None:
        """See Engine."""
        self.engine.sleep()

    def close(self) -> None:
        """See Engine."""
        self.engine.close()

    def stats(self) -> Mapping[str, float | None]:
        """See Engine; of this rank's engine."""
        return self.engine.stats()


class FirstRankEngine(Engine):
    """An engine of rank 0, such as vLLM servers, that generates the rollouts of all prompts for all ranks.

    A server batches the requests of all prompts by itself, so nothing is gained where every rank sends its own, and the
    limits on concurrent requests and on waiting hold for the run as they are configured. Two sources may generate at
    once: rank 0 shares their rollouts in the order in which they end.

    Args:
        make: makes the engine, on rank 0 alone; it must update weights by `sending`, with this world and dtype.
        world: of the run.
        dtype: in which the engine takes weights.

    Raises:
        EngineError: on all ranks, if the engine cannot be made.
    """

    def __init__(self, make: Callable[[], Engine], world: World, dtype: torch.dtype):
        self.world, self.dtype = world, dtype
        self.engine: Engine | None = None  # on rank 0
        self._turn, self._received = threading.Lock(), dict[WeightTag, Rollouts | EngineError]()

        def start() -> tuple[int, bool]:
            self.engine = engine = make()
            return engine.num_weight_slots, engine.has_model_logprobs

        self.num_weight_slots, self.has_model_logprobs = on_first(world, start)

    def update_weights(self, weights: Mapping[str, torch.Tensor], tag: WeightTag) -> None:
        """See Engine; every rank passes its shards."""
        with failing_together(self.world):
            if self.engine:
                self.engine.update_weights(weights, tag)
            else:
                with sending(weights, {}, self.world, self.dtype):
                    pass

    def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, tag: WeightTag) -> Rollouts:
        """See Engine; every rank passes the same prompts. An error of the engine is raised on all."""
        if self.engine is None:
            return self._receive(tag)
        found: Rollouts | EngineError
        try:
            found = self.engine.generate(prompts, n, sampling, tag)
        except EngineError as error:
            found = error
        with self._turn:
            self.world.broadcast([*tag, n])
            return _share(self.world, tag, n, found)

    def _receive(self, tag: WeightTag) -> Rollouts:
        """The rollouts of one call from rank 0; those of another call that end before are kept for it."""
        while True:
            with self._turn:
                if (found := self._received.pop(tag, None)) is not None:
                    break
                source, version, n = self.world.broadcast(None)
                other = WeightTag(source, version)
                try:
                    self._received[other] = _share(self.world, other, n, None)
                except EngineError as error:
                    self._received[other] = error
        if isinstance(found, EngineError):
            raise found
        return found

    def sleep(self) -> None:
        """See Engine."""
        if self.engine:
            self.engine.sleep()

    def close(self) -> None:
        """See Engine."""
        if self.engine:
            self.engine.close()

    def stats(self) -> Mapping[str, float | None]:
        """See Engine; empty on other ranks."""
        return self.engine.stats() if self.engine else {}


def _share(world: World, tag: WeightTag, n: int, found: Rollouts | EngineError | None) -> Rollouts:
    """What rank 0 has found, on all ranks: rollouts, or an error that is raised."""

    def shape() -> tuple[int, ...]:
        if isinstance(found, EngineError):
            raise found
        assert found is not None
        return tuple(found.tokens.shape)

    num_rows, longest = on_first(world, shape)
    tokens, logprobs = torch.zeros(num_rows, longest, dtype=torch.int64), torch.zeros(num_rows, longest)
    lengths, truncated = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.int64)
    if isinstance(found, Rollouts):
        tokens, logprobs, lengths, truncated = found.tokens, found.logprobs, found.lengths, found.truncated.long()
    world.broadcast_tensors([tokens, logprobs, lengths, truncated])
    return Rollouts(
        tokens=tokens,
        lengths=lengths,
        logprobs=logprobs,
        truncated=truncated.bool(),
        num_per_prompt=n,
        tag=tag,
    )
