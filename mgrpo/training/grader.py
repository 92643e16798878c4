"""Reads the answers of a step's rollouts and assigns credit.

Letters: B prompts, M policy and N momentum rollouts a prompt, G = M + N.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from mgrpo.algorithm.credit import assign_credit
from mgrpo.algorithm.reward import needs_labels
from mgrpo.config import Config
from mgrpo.distributed.world import ALONE, World
from mgrpo.errors import EngineError
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.extract import make_extractor
from mgrpo.grading.worker import StartError
from mgrpo.observe.step import Outcome
from mgrpo.observe.timer import Timer
from mgrpo.rollout.source import RolloutBatch
from mgrpo.rollout.stop import StopTexts, read_texts
from mgrpo.training.passes import LogProbs
from mgrpo.training.shared_checker import SharedChecker
from mgrpo.types import TrajectoryBatch


class Grader:
    """Finds answers in responses, compares them, and turns them into advantages.

    Args:
        config: of the run.
        tokenizer: decodes responses.
        stop: texts that end a response and are no part of an answer.
        timer: times `vote`.
    """

    def __init__(self, config: Config, tokenizer: Any, stop: StopTexts | None, timer: Timer, world: World = ALONE):
        self.config, self.tokenizer, self.stop, self.timer = config, tokenizer, stop, timer
        answer = config.answer
        self.extract = make_extractor(answer.extract)
        options: dict[str, Any] = {"timeout_s": answer.timeout_s, "num_workers": answer.workers}
        make = AnswerChecker if world.size == 1 else partial(SharedChecker, world)
        self.checker = make(mode=answer.equivalence, **options)

    def assign_credit(self, batch: RolloutBatch, logprobs: LogProbs) -> Outcome:
        """Filters, votes, rewards and compares within groups.

        True answers are used for metrics, and for training only by the reward `labels`. Raises EngineError if the
        processes that compare answers cannot start.
        """
        with self.timer("vote"):
            try:
                return self._assign(batch, logprobs)
            except StartError as error:
                raise EngineError(f"answers: {error}") from error

    def _assign(self, batch: RolloutBatch, logprobs: LogProbs) -> Outcome:
        c, t, labels = self.config, batch.trajectories, [prompt.answer for prompt in batch.prompts]
        credit = assign_credit(
            self.read_groups(t),
            logprobs.filter_entropy,
            t.num_policy,
            filter=c.filter,
            vote=c.vote,
            objective=c.objective,
            checker=self.checker,
            may_train=self._may_train(t),
            mean_entropy=logprobs.entropy,
            self_certainty=logprobs.self_certainty,
            true_answers=labels if needs_labels(c.objective.reward) else None,
            backend=c.kernels.backend,
        )
        return Outcome(
            **vars(credit),
            lengths=t.lengths,
            truncated=t.truncated,
            entropy=logprobs.entropy,
            label_correct=[
                self.checker.is_correct(elected, label)
                for elected, label in zip(credit.labels, labels, strict=True)
                if label is not None
            ],
        )

    def read(self, prompts: Sequence[Sequence[int]], responses: Sequence[list[int]]) -> list[str | None]:
        """The answer in each response; None where there is none."""
        if not responses:
            return []
        return [self.extract(text) for text in read_texts(self.tokenizer, responses, self.stop, prompts=prompts)]

    def read_groups(self, t: TrajectoryBatch) -> list[list[str | None]]:
        """Answers of every trajectory, [B][G]."""
        num_prompts, group = t.truncated.shape
        rows = range(num_prompts * group)
        answers = self.read([t.prompt(row) for row in rows], [t.response(row) for row in rows])
        return [answers[b * group : (b + 1) * group] for b in range(num_prompts)]

    def _may_train(self, t: TrajectoryBatch) -> torch.Tensor:
        """[B, G] bool, trajectories that the options allow in the loss."""
        c = self.config
        may = (torch.arange(t.truncated.shape[1]) < c.num_train).expand(t.truncated.shape)
        if c.objective.momentum_in_loss:
            may = may | t.is_momentum
        return may & ~t.truncated if c.rollout.truncated == "mask" else may
