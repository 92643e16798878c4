"""Metrics of one rollout batch.

Letters: B prompts, M policy and N momentum rollouts a prompt, G = M + N.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mgrpo.algorithm.credit import Credit
from mgrpo.observe.catalogue import METRICS
from mgrpo.types import Metrics


@dataclass(frozen=True, kw_only=True)
class Outcome(Credit):
    """Credit and lengths of one rollout batch, before the update; policy rollouts are first in G."""

    lengths: torch.Tensor  # [B, G] int64
    truncated: torch.Tensor  # [B, G] bool
    entropy: torch.Tensor  # [B, G] fp32, mean token entropy under the policy
    label_correct: list[bool]  # pseudo-label equals the true answer, for prompts with both


def step_metrics(step: int, outcome: Outcome) -> Metrics:
    """A row with every key of the catalogue, filled with the metrics of the rollout batch."""
    return {key: None for key, metric in METRICS.items() if metric.always} | {"step": step} | outcome_metrics(outcome)


def outcome_metrics(outcome: Outcome) -> Metrics:
    """Rewards, votes, lengths, answer concentration and pruning of one rollout batch; a share is in [0, 1]."""
    o, m = outcome, outcome.num_policy
    pruned = ~o.keep
    known = o.vote.agreement_known
    metrics: Metrics = {
        "reward_mean": mean(o.rewards[:, :m]),
        "top_answer": top_answer(o.answers)[0],
        "majority_share": mean(o.vote.share),
        "vote_agreement": mean(o.vote.agreement[known]) if known.any() else None,
        "tie_share": mean(o.vote.tie),
        "no_signal_share": mean(~o.vote.signal),
        "zero_signal_share": mean((o.advantage == 0).all(1)),
        "distinct_answers": mean([len({i for i in row if i >= 0}) for row in o.answer_ids.tolist()]),
        "response_length": mean(o.lengths),
        "truncated_share": mean(o.truncated),
        "pruned_share": mean(pruned),
        "pruned_length": mean(o.lengths[pruned]) if pruned.any() else None,
        "kept_length": mean(o.lengths[o.keep]) if o.keep.any() else None,
        "vote_accuracy": mean(o.label_correct) if o.label_correct else None,
    }
    sources = {"": slice(None), "_policy": slice(0, m), "_momentum": slice(m, None)}
    for suffix, columns in sources.items():
        ids = o.answer_ids[:, columns]
        if ids.shape[1] == 0:
            continue
        metrics["token_entropy" + suffix] = mean(weighted(o.entropy[:, columns], o.lengths[:, columns]))
        metrics["unparseable_share" + suffix] = mean(ids < 0)
        metrics["top_answer_share" + suffix] = top_answer(o.answers, columns)[1]
        if suffix:
            metrics["response_length" + suffix] = mean(o.lengths[:, columns])
    if m < o.answer_ids.shape[1]:
        metrics["reward_mean_momentum"] = mean(o.rewards[:, m:])
    return metrics


def top_answer(answers: Sequence[Sequence[str | None]], columns: slice = slice(None)) -> tuple[str | None, float]:
    """The most common answer across different prompts, and its share of all rollouts."""
    given = [answer for row in answers for answer in row[columns]]
    counts = Counter(answer for answer in given if answer is not None)
    if not counts:
        return None, 0.0
    answer, count = counts.most_common(1)[0]
    return answer, count / len(given)


def mean(values: torch.Tensor | Sequence[float]) -> float:
    """Mean as a float, 0 for no values."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return float(values.mean()) if values.numel() else 0.0


def weighted(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean, 0-d; 0 if all weights are 0."""
    return (values * weights).sum() / weights.sum().clamp_min(1)
