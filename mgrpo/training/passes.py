"""Forward passes over the rollouts of a step, before the update: log-probs and entropies under every model needed.

Letters: B prompts, G = M + N rollouts a prompt, R = B * G trajectories, L response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

import mgrpo_kernels as K
from mgrpo.algorithm.credit import needed_evidence
from mgrpo.config import Config
from mgrpo.models.forward import Forward, TokenLogProbs
from mgrpo.models.load import LoadedModel
from mgrpo.models.momentum import Momentum
from mgrpo.observe.step import mean
from mgrpo.observe.timer import Timer
from mgrpo.rollout.engine import Engine
from mgrpo.rollout.parity import check_parity
from mgrpo.rollout.source import RolloutBatch
from mgrpo.training.schedule import is_due
from mgrpo.types import Metrics, Source, TrajectoryBatch, WeightTag

# The parity of engine and trainer is checked under each of the first versions of the weights.
PARITY_STEPS = 2
PARITY_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class LogProbs:
    """Results of the passes; [R, L] a token, zeros at padding; [B, G] a trajectory."""

    old: torch.Tensor  # [R, L] fp32, under the policy
    reference: torch.Tensor | None  # [R, L] fp32, under the reference of the KL
    kl_initial: float | None  # mean k3 KL of the policy's tokens to the initial model
    entropy: torch.Tensor  # [B, G] fp32, mean token entropy under the policy
    filter_entropy: torch.Tensor  # [B, G] fp32, of the filter
    self_certainty: torch.Tensor | None  # [B, G] fp32
    parity: Metrics  # differences from the engine's log-probs; {} at steps without a check

    def not_finite(self, trajectories: TrajectoryBatch) -> torch.Tensor:
        """[B, G] bool, trajectories with a NaN or infinity at response tokens."""
        tokens = [self.old, trajectories.rollout_logprob, *([] if self.reference is None else [self.reference])]
        finite = torch.stack([(values.isfinite() | ~trajectories.mask).all(1) for values in tokens]).all(0)
        return ~(finite.view(self.entropy.shape) & self.entropy.isfinite() & self.filter_entropy.isfinite())


class Passes:
    """Runs the policy, the momentum model and the initial model over trajectories, as the configuration requires.

    Args:
        config: of the run.
        loaded: the policy.
        momentum: the momentum model.
        forward: runs a forward pass.
        engine: its log-probs are compared with these.
        initial: lets the policy compute with the weights at the start of the run.
        timer: times `score`.
    """

    def __init__(
        self,
        config: Config,
        loaded: LoadedModel,
        momentum: Momentum,
        forward: Forward,
        engine: Engine,
        *,
        initial: Callable[[], AbstractContextManager[None]],
        timer: Timer,
    ):
        self.config, self.loaded, self.momentum, self.forward = config, loaded, momentum, forward
        self.engine, self.initial, self.timer = engine, initial, timer

    @torch.no_grad()
    def run(self, batch: RolloutBatch) -> LogProbs:
        """All passes of one step; raises StaleWeightsError or ParityError if the engine's log-probs differ."""
        with self.timer("score"):
            return self._run(batch.step, batch.trajectories)

    def _run(self, step: int, t: TrajectoryBatch) -> LogProbs:
        c = self.config
        policy = self.logprobs(t, self_certainty="self_certainty" in needed_evidence(c.vote, c.objective))
        filter_entropy = policy.entropy
        if c.filter.score == "source" and c.rollout.num_momentum:
            rows = t.is_momentum.flatten().nonzero().flatten()
            with self.momentum.swapped():
                filter_entropy = filter_entropy.index_copy(0, rows, self.logprobs(t, rows=rows).entropy[rows])
        initial = reference = kl_initial = None
        uses_reference = c.objective.kl_coef > 0
        if (uses_reference and c.objective.kl_reference == "initial") or is_due(c.log.kl_initial_every, step, c.steps):
            with self.initial():
                initial = self.logprobs(t).logprob
            difference = (initial - policy.logprob)[t.by_policy]
            kl_initial = mean(difference.exp() - difference - 1)
        if uses_reference and c.objective.kl_reference == "initial":
            reference = initial
        elif uses_reference:
            with self.momentum.swapped():
                reference = self.logprobs(t).logprob
        certainty = policy.self_certainty
        return LogProbs(
            old=policy.logprob,
            reference=reference,
            kl_initial=kl_initial,
            entropy=self._per_trajectory(policy.entropy, t),
            filter_entropy=self._per_trajectory(filter_entropy, t, reduce=c.filter.entropy),
            self_certainty=None if certainty is None else self._per_trajectory(certainty, t),
            parity=self._compare(t, policy.logprob) if not c.rollout.ahead and self._checks(step) else {},
        )

    @torch.no_grad()
    def check_engine(self, step: int, sample: Callable[[], TrajectoryBatch]) -> Metrics:
        """Compares log-probs of the engine before the weights change, where that is due for the batch of `step`.

        Args:
            step: whose rollouts the engine is about to generate.
            sample: generates rollouts under the weights of now.

        Raises:
            StaleWeightsError: they were generated with others.
        """
        if not self._checks(step):
            return {}
        trajectories = sample()
        with self.timer("score"):
            return self._compare(trajectories, self.logprobs(trajectories).logprob)

    def logprobs(self, trajectories: TrajectoryBatch, **options: Any) -> TokenLogProbs:
        """Log-probs and entropies under the model's current weights."""
        return self.forward.run(self.loaded.model, trajectories, **options)

    def _checks(self, step: int) -> bool:
        """Whether the engine's log-probs are compared at a step."""
        c, engine = self.config.rollout, self.engine
        due = step - c.ahead <= PARITY_STEPS or (c.parity_every > 0 and step % c.parity_every == 0)
        # Under nucleus sampling vLLM divides by a probability mass that the trainer does not know.
        return due and engine.has_model_logprobs and (c.top_p == 1 or engine.weights_are_shared)

    def _compare(self, t: TrajectoryBatch, old: torch.Tensor) -> Metrics:
        """Differences of the engine's log-probs under both models from the trainer's, of rollouts by those of now."""
        c, engine = self.config.rollout, self.engine

        def compare(parts: list[torch.Tensor], expected: torch.Tensor, source: Source) -> float:
            return max(
                check_parity(
                    t.rollout_logprob[rows],
                    expected[rows],
                    t.mask[rows],
                    dtype=self.loaded.dtype,
                    tag=WeightTag(source, t.version),
                    shared=engine.weights_are_shared,
                    top_p=c.top_p,
                )
                for rows in parts
            )

        from_momentum = t.is_momentum.flatten()
        prompt = torch.arange(len(t.prompts)).repeat_interleave(t.is_momentum.shape[1])
        # Each copy of the weights alone: among many, the mean would hide a stale one.
        parts = [torch.isin(prompt, torch.tensor(part)) for part in engine.parts(t.prompts)]
        policy = [(part & ~from_momentum).nonzero().flatten() for part in parts]
        metrics: Metrics = {"parity_policy": compare(policy, old, "policy")}
        if c.num_momentum:
            momentum = [(part & from_momentum).nonzero().flatten()[:PARITY_ROWS] for part in parts]
            with self.momentum.swapped():
                expected = self.logprobs(t, rows=torch.cat(momentum).sort().values).logprob
            metrics["parity_momentum"] = compare(momentum, expected, "momentum")
        return metrics

    def _per_trajectory(self, values: torch.Tensor, t: TrajectoryBatch, reduce: str = "mean") -> torch.Tensor:
        """Token values [R, L] to one number a trajectory, [B, G]."""
        backend = self.config.kernels.backend
        return K.trajectory_entropy(values, mask=t.mask, reduce=reduce, backend=backend).view(t.truncated.shape)
