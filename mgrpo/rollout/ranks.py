"""An engine on every rank: each generates the rollouts of whole prompts, and all ranks get all rollouts.

Letters: W ranks, B prompts, n rollouts a prompt, L longest response in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from mgrpo.config.distributed import LANES
from mgrpo.distributed.together import raise_together
from mgrpo.distributed.world import World
from mgrpo.errors import EngineError
from mgrpo.rollout.engine import Engine
from mgrpo.types import Rollouts, Sampling, WeightTag


class RankedEngine(Engine):
    """The engines of all ranks as one.

    Args:
        engine: this rank's engine.
        world: of the run.
        tree: generate in blocks of prompts that do not depend on W, so that the bits of log-probs do not either.
    """

    def __init__(self, engine: Engine, world: World, *, tree: bool):
        self.engine, self.world = engine, world
        self.num_blocks = LANES if tree else world.size
        self.num_weight_slots = engine.num_weight_slots
        self.weights_are_shared, self.has_model_logprobs = engine.weights_are_shared, engine.has_model_logprobs

    def update_weights(self, weights: Mapping[str, torch.Tensor], tag: WeightTag) -> None:
        """See Engine; every rank passes its shards."""
        self.engine.update_weights(weights, tag)

    def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, tag: WeightTag) -> Rollouts:
        """See Engine; every rank passes the same prompts. An error of any rank's engine is raised on all."""
        num_rows, width = len(prompts) * n, sampling.max_new_tokens
        tokens, logprobs = torch.zeros(num_rows, width, dtype=torch.int64), torch.zeros(num_rows, width)
        lengths, truncated = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.int64)
        problem: EngineError | None = None
        try:
            for block in self._blocks(prompts):
                indices = tuple(sampling.index(b) for b in block)
                part = self.engine.generate([prompts[b] for b in block], n, replace(sampling, indices=indices), tag)
                rows = (torch.tensor(block)[:, None] * n + torch.arange(n)).flatten()
                longest = part.tokens.shape[1]
                tokens[rows, :longest], logprobs[rows, :longest] = part.tokens, part.logprobs
                lengths[rows], truncated[rows] = part.lengths, part.truncated.long()
        except EngineError as error:
            problem = error
        raise_together(self.world, problem)
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

    def _blocks(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """This rank's blocks of prompts; each has prompts of all lengths."""
        order = sorted(range(len(prompts)), key=lambda b: len(prompts[b]))
        own = range(self.world.rank, self.num_blocks, self.world.size)
        return [block for k in own if (block := order[k :: self.num_blocks])]

    def sleep(self) -> None:
        """See Engine."""
        self.engine.sleep()

    def close(self) -> None:
        """See Engine."""
        self.engine.close()

    def stats(self) -> Mapping[str, float | None]:
        """See Engine; of this rank's engine."""
        return self.engine.stats()
