"""What a plug-in logs of a judged batch. Letters: B prompts, M policy and N momentum rollouts a prompt, G = M + N."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mgrpo.grading.checker import AnswerChecker
from mgrpo.judging import Judgement
from mgrpo.labels import Label
from mgrpo.metrics import Metrics, Outcome, mean, outcome_metrics


def judged_metrics(
    judged: Judgement,
    *,
    lengths: torch.Tensor,
    truncated: torch.Tensor,
    entropy: torch.Tensor,
    true_answers: Sequence[Label | None],
    checker: AnswerChecker,
) -> Metrics:
    """The trainer's metrics of votes, lengths and pruning, and `accuracy` of the policy where answers are known.

    Args:
        judged: what `mgrpo.judging.judge` returned.
        lengths: [B, G] int64, response tokens.
        truncated: [B, G] bool, cut at the length limit.
        entropy: [B, G] fp32, mean token entropies in nats.
        true_answers: [B], None where there is none; they are read for metrics alone.
        checker: compares answers.
    """
    known = [(b, answer) for b, answer in enumerate(true_answers) if answer is not None]
    outcome = Outcome(
        **vars(judged),
        lengths=lengths,
        truncated=truncated,
        entropy=entropy,
        label_correct=[checker.is_correct(judged.labels[b], answer) for b, answer in known],
    )
    right = [
        checker.is_correct(given, answer) for b, answer in known for given in judged.answers[b][: judged.num_policy]
    ]
    return outcome_metrics(outcome) | {"accuracy": mean(right) if right else None}
