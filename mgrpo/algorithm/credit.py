"""Credit, from answers and entropies to advantages: filter, vote, reward and group advantage, without a model.

Letters: B prompts, M policy and N momentum rollouts a prompt, G = M + N; policy rollouts come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mgrpo.algorithm.advantage import group_advantage
from mgrpo.algorithm.evidence import Evidence
from mgrpo.algorithm.filter import filter_trajectories
from mgrpo.algorithm.reward import REWARDS
from mgrpo.algorithm.vote import VOTE_RULES, Vote, first_of_class
from mgrpo.algorithm.vote import vote as elect
from mgrpo.config import FilterConfig, ObjectiveConfig, VoteConfig
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.label_text import Label


@dataclass(frozen=True, kw_only=True)
class Credit:
    """Credit of the rollouts of one batch."""

    answers: list[list[str | None]]  # [B][G]
    answer_ids: torch.Tensor  # [B, G] int64, -1 for no answer
    labels: list[str | None]  # [B], text of the pseudo-label
    keep: torch.Tensor  # [B, G] bool, passed the filter
    trains: torch.Tensor  # [B, G] bool, enters the loss
    vote: Vote
    rewards: torch.Tensor  # [B, G] fp32
    advantage: torch.Tensor  # [B, G] fp32, 0 where `trains` is False
    num_policy: int  # M


def assign_credit(
    answers: list[list[str | None]],
    entropy: torch.Tensor,
    num_policy: int,
    *,
    filter: FilterConfig,
    vote: VoteConfig,
    objective: ObjectiveConfig,
    checker: AnswerChecker,
    may_train: torch.Tensor | None = None,
    mean_entropy: torch.Tensor | None = None,
    self_certainty: torch.Tensor | None = None,
    true_answers: Sequence[Label | None] | None = None,
    backend: str = "auto",
) -> Credit:
    """Filters trajectories, elects pseudo-labels, rewards agreement and compares rewards within each group.

    Args:
        answers: [B][G], what `mgrpo.grading.make_extractor` finds in each response; None where there is none.
        entropy: [B, G] fp32 in nats, on the CPU, for the filter.
        num_policy: M; the other G - M rollouts of a prompt are the momentum model's.
        filter, vote, objective: options; of `objective`, reward and advantage.
        checker: decides which answers are the same.
        may_train: [B, G] bool, rollouts that the loss may take; the policy's by default.
        mean_entropy: [B, G] fp32, mean token entropies, for the reward "entropy"; `entropy` by default.
        self_certainty, true_answers: [B, G] fp32 and [B], for vote rules and rewards that need them.
        backend: backend of mgrpo_kernels.

    Raises:
        ValueError: shapes that disagree, or a vote rule or reward without its evidence.

    Source: arXiv 2512.13070, algorithm 1; docs/algorithm.md has every choice.
    """
    needs = needed_evidence(vote, objective)
    shape = _check(answers, entropy, needs, {"correct": true_answers, "self_certainty": self_certainty})
    answer_ids = torch.tensor(checker.group_classes(answers)).view(shape)
    keep = filter_trajectories(entropy, filter, backend=backend)
    voters = entropy.isfinite() if filter.applies_to == "loss" else keep
    evidence = Evidence(
        answer_ids=answer_ids,
        num_policy=num_policy,
        entropy=entropy if mean_entropy is None else mean_entropy,
        self_certainty=self_certainty,
    )
    elected = elect(evidence, voters, vote, backend=backend)
    if "correct" in needs:
        evidence = replace(evidence, correct=_grade(answers, true_answers or (), checker))
    rewards = REWARDS[objective.reward].compute(elected, evidence)
    trains = keep & (~evidence.is_momentum if may_train is None else may_train)
    return Credit(
        answers=answers,
        answer_ids=answer_ids,
        labels=[first_of_class(*row) for row in zip(answer_ids.tolist(), answers, elected.label.tolist(), strict=True)],
        keep=keep,
        trains=trains,
        vote=elected,
        rewards=rewards,
        advantage=group_advantage(rewards, keep, trains, objective, backend=backend),
        num_policy=num_policy,
    )


def needed_evidence(vote: VoteConfig, objective: ObjectiveConfig) -> dict[str, str]:
    """Fields of Evidence that are computed for the vote rule or the reward alone, and the option that needs each."""
    needed = {need: f"objective.reward {objective.reward}" for need in REWARDS[objective.reward].needs}
    return needed | {need: f"vote.rule {vote.rule}" for need in VOTE_RULES[vote.rule].needs}


def _check(
    answers: list[list[str | None]], entropy: torch.Tensor, needs: dict[str, str], given: dict[str, object]
) -> tuple[int, int]:
    """(B, G) of the answers; raises ValueError for shapes that disagree and for missing evidence."""
    shape = (len(answers), len(answers[0]) if answers else 0)
    if tuple(entropy.shape) != shape or any(len(row) != shape[1] for row in answers):
        raise ValueError(
            f"assign_credit: entropy must be [B, G] = {list(shape)} as answers are, got {list(entropy.shape)} and rows "
            f"of {sorted({len(row) for row in answers})} answers. Whole groups get credit at once."
        )
    for need, option in needs.items():
        if given[need] is None:
            name = "true_answers" if need == "correct" else need
            raise ValueError(f"assign_credit: {name} must be given for {option}, got None.")
    return shape


def _grade(
    answers: list[list[str | None]], true_answers: Sequence[Label | None], checker: AnswerChecker
) -> torch.Tensor:
    """[B, G] bool, answers that equal the true answer of their prompt."""
    return torch.tensor(
        [[checker.is_correct(a, true) for a in row] for row, true in zip(answers, true_answers, strict=True)]
    )
