"""Observers of a run: retention, evaluation, sampled rollouts and reports of non-finite steps.

Each takes the result of a step, after the update, and returns or adds metrics or records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mgrpo.config import Config
from mgrpo.data.prompts import Dataset
from mgrpo.errors import EngineError, StaleWeightsError
from mgrpo.evaluation.evaluate import Evaluation, evaluate
from mgrpo.models.load import LoadedModel
from mgrpo.observe.retention import Retention
from mgrpo.observe.step import Outcome
from mgrpo.observe.timer import Timer
from mgrpo.rollout.generator import Generator
from mgrpo.rollout.source import RolloutBatch
from mgrpo.training.grader import Grader
from mgrpo.training.learner import Update
from mgrpo.training.passes import LogProbs
from mgrpo.training.schedule import is_due
from mgrpo.types import Metrics, Source

MAX_FAULT_ROWS = 64  # trajectories in the report of a non-finite step


@dataclass(kw_only=True)
class StepResult:
    """The results of one step; the observers fill in the last four."""

    step: int
    age: int  # optimiser steps between the policy that generated the batch and the one that it trains
    batch: RolloutBatch
    logprobs: LogProbs
    credit: Outcome
    update: Update
    metrics: Metrics = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)  # rollouts to show, at evaluation steps
    fault: dict[str, Any] | None = None  # report of a non-finite step
    engine_error: EngineError | None = None  # the engine failed in an evaluation: no further step is possible


class RetentionWatch:
    """Collects answers of clear majority in the first steps; later measures the share of them that is unchanged."""

    def __init__(self, retention: Retention, grader: Grader, timer: Timer):
        self.retention, self.grader, self.timer = retention, grader, timer

    def requests(self, step: int, batch: Sequence[int]) -> Sequence[int]:
        """Indices of the prompts to answer greedily at a step whose own prompts are `batch`."""
        return self.retention.asks(step, batch)

    def after(self, batch: RolloutBatch, credit: Outcome) -> Metrics:
        """The share of unchanged answers; None at a step without requests."""
        retention, checker = self.retention, self.grader.checker
        with self.timer("monitor"):
            read = self.grader.read([prompt.ids for prompt in batch.asked], batch.replies)
            greedy = {prompt.index: answer for prompt, answer in zip(batch.asked, read, strict=True)}
            if batch.step <= retention.last_collected:
                shares, indices = credit.vote.share.tolist(), [prompt.index for prompt in batch.prompts]
                # A batch that was in flight under other options of a run that is resumed was asked for others.
                own = [greedy.get(index) for index in indices]
                retention.collect(indices, own, credit.labels, shares, checker)
                return {"retention": None}
            return {"retention": retention.measure(greedy, checker)}


class Evaluator:
    """Accuracy of policy and momentum model on the eval set.

    Args:
        config: of the run.
        loaded: model and tokenizer.
        probe: the eval set; without it nothing is evaluated.
        generator: updates the engine's weights.
        grader: reads and compares answers.
    """

    def __init__(
        self, config: Config, loaded: LoadedModel, probe: Dataset | None, generator: Generator, grader: Grader
    ):
        self.config, self.loaded, self.probe, self.generator, self.grader = config, loaded, probe, generator, grader

    def metrics(self, step: int) -> Metrics:
        """Accuracy of every source after a step; {} without an eval set."""
        found: Metrics = {}
        sources: list[Source] = ["policy", "momentum"] if self.config.rollout.num_momentum else ["policy"]
        for source in sources if self.probe else ():
            result = self.evaluate(source, step)
            found[f"probe_accuracy_{source}"] = result.avg_at_k
            found[f"probe_greedy_{source}"] = result.greedy
            found[f"probe_majority_{source}"] = result.maj_at_k
            found[f"probe_pass_{source}"] = result.pass_at_k
        return found

    def evaluate(self, source: Source, step: int) -> Evaluation:
        """Evaluates the current weights of a source."""
        assert self.probe is not None
        return evaluate(
            self.generator.engine,
            self.loaded,
            self.probe,
            self.grader.extract,
            self.grader.checker,
            self.generator.sampling(step, "probe"),
            samples=self.config.eval.samples,
            tag=self.generator.update_weights(source),
            stop=self.grader.stop,
        )

    def after(self, result: StepResult) -> None:
        """Adds metrics to a result, or the error of an engine that fails, because the step itself is complete."""
        try:
            result.metrics |= self.metrics(result.step)
        except StaleWeightsError:
            raise
        except EngineError as error:
            result.engine_error = error


class Describer:
    """Describes trajectories for people: samples at every evaluation, and those of non-finite steps."""

    def __init__(self, config: Config, tokenizer: Any):
        self.config, self.tokenizer = config, tokenizer

    def after(self, result: StepResult) -> None:
        """Adds samples and faults to a result."""
        if result.update.faults:
            result.fault = self._describe_faults(result)
        num_prompts = min(self.config.log.samples, len(result.batch.prompts))
        if num_prompts and is_due(self.config.eval.every, result.step, self.config.steps):
            result.samples = self._describe(range(num_prompts * result.credit.keep.shape[1]), result)

    def _describe(self, rows: Sequence[int], result: StepResult) -> list[dict[str, Any]]:
        """Prompt, response, answer, pseudo-label, reward and advantage of trajectories."""
        c, trajectories = result.credit, result.batch.trajectories
        responses = self.tokenizer.batch_decode([trajectories.response(row) for row in rows])
        return [
            {
                "step": result.step,
                "prompt": result.batch.prompts[b].text,
                "source": "momentum" if i >= c.num_policy else "policy",
                "response": response,
                "answer": c.answers[b][i],
                "pseudo_label": c.labels[b],
                "reward": float(c.rewards[b, i]),
                "advantage": float(c.advantage[b, i]),
                "entropy": float(c.entropy[b, i]),
                "kept": bool(c.keep[b, i]),
            }
            for row, response in zip(rows, responses, strict=True)
            for b, i in [divmod(row, c.keep.shape[1])]
        ]

    def _describe_faults(self, result: StepResult) -> dict[str, Any]:
        """Report of non-finite optimiser steps, with their trajectories, the non-finite ones first."""
        t, logprobs, faults = result.batch.trajectories, result.logprobs, result.update.faults
        suspect: torch.Tensor = result.update.not_finite.flatten()
        rows = sorted({row for fault in faults for row in fault.rows}, key=lambda row: not bool(suspect[row]))
        rows = rows[:MAX_FAULT_ROWS]
        return {
            "step": result.step,
            "optimizer_steps": [vars(fault) for fault in faults],
            "trajectories": [
                entry
                | {
                    "finite": not bool(suspect[row]),
                    "tokens": t.response(row),
                    "old_logprob": logprobs.old[row, t.mask[row]].tolist(),
                    "rollout_logprob": t.rollout_logprob[row, t.mask[row]].tolist(),
                }
                for row, entry in zip(rows, self._describe(rows, result), strict=True)
            ],
        }
