"""Votes: from answers to pseudo-labels. To add a rule, write a function, its row in VOTE_RULES and its name in
config/vote.py.

Letters: B prompts, M policy rollouts, N momentum rollouts a prompt, G = M + N; policy rollouts come first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

import mgrpo_kernels as K
from mgrpo.algorithm.evidence import Evidence
from mgrpo.config import VoteConfig

# K.majority_vote counts in integers, in which equal sums tie whatever their order: votes of a self-certainty of 1, and
# the largest that counts, so that no sum of 4,096 rollouts with any momentum weight overflows.
FIXED_POINT, MAX_CERTAINTY = 2**20, 2.0**10


@dataclass(frozen=True, kw_only=True)
class Vote:
    """The pseudo-label of each prompt, with its shares, tie and agreement."""

    label: torch.Tensor  # [B] int64, class id; -1 where there is none
    share: torch.Tensor  # [B] fp32, votes of the label / votes
    tie: torch.Tensor  # [B] bool, before the tie rule
    class_share: torch.Tensor  # [B, G] fp32, share of each rollout's own class
    signal: torch.Tensor  # [B] bool, the label exists and its share and margin are large enough
    agreement: torch.Tensor  # [B] bool, policy and momentum rollouts elect the same class
    agreement_known: torch.Tensor  # [B] bool, both elect one


def majority(evidence: Evidence, voters: torch.Tensor, config: VoteConfig, backend: str) -> K.MajorityVote:
    """The class with most votes; a momentum rollout has `momentum_weight` votes.

    A tie goes to the class with more votes of the momentum model, by weight, then to the class of the earliest rollout.
    """
    is_momentum = evidence.is_momentum
    weights = torch.where(is_momentum, config.momentum_weight, 1).to(torch.int32)
    return K.majority_vote(evidence.answer_ids, keep=voters, weights=weights, tie_break=is_momentum, backend=backend)


def self_certainty(evidence: Evidence, voters: torch.Tensor, config: VoteConfig, backend: str) -> K.MajorityVote:
    """The class with the largest sum of self-certainty, a momentum rollout's times `momentum_weight`.

    A tie goes as in `majority`. A rollout whose self-certainty is 0 or non-finite does not vote.
    """
    assert evidence.self_certainty is not None
    is_momentum = evidence.is_momentum
    certainty = evidence.self_certainty.double().nan_to_num(nan=0, posinf=0, neginf=0).clamp(0, MAX_CERTAINTY)
    weights = (certainty * FIXED_POINT).round().long() * torch.where(is_momentum, config.momentum_weight, 1)
    return K.majority_vote(evidence.answer_ids, keep=voters, weights=weights, tie_break=is_momentum, backend=backend)


class VoteRule(NamedTuple):
    """A way to elect a pseudo-label."""

    elect: Callable[[Evidence, torch.Tensor, VoteConfig, str], K.MajorityVote]
    """From the evidence, the [B, G] bool rollouts that vote, the options and the backend of mgrpo_kernels."""
    needs: tuple[str, ...] = ()
    """Fields of Evidence that are computed only for this rule; never `correct`."""


VOTE_RULES = {
    "majority": VoteRule(majority),
    "self-certainty": VoteRule(self_certainty, needs=("self_certainty",)),
}


def vote(evidence: Evidence, keep: torch.Tensor, config: VoteConfig, *, backend: str = "auto") -> Vote:
    """Elects each prompt's pseudo-label by the rule of the options.

    Args:
        evidence: answers, and what the rule needs.
        keep: [B, G] bool, rollouts that may vote.
        config: rule, pool, weight of momentum votes, least share and margin.
        backend: backend of mgrpo_kernels.
    """
    is_momentum, ids = evidence.is_momentum, evidence.answer_ids
    pool = {"both": keep, "policy": keep & ~is_momentum, "momentum": keep & is_momentum}
    elected = VOTE_RULES[config.rule].elect(evidence, pool[config.pool], config, backend)
    by_policy = K.majority_vote(ids, keep=pool["policy"], backend=backend).label
    by_momentum = K.majority_vote(ids, keep=pool["momentum"], backend=backend).label
    return Vote(
        label=elected.label,
        share=elected.share,
        tie=elected.tie,
        class_share=elected.class_share,
        signal=(elected.label >= 0) & (elected.share >= config.min_share) & (elected.margin >= config.min_margin),
        agreement=(by_policy == by_momentum) & (by_policy >= 0),
        agreement_known=(by_policy >= 0) & (by_momentum >= 0),
    )


def first_of_class(answer_ids: Sequence[int], answers: Sequence[str | None], label: int) -> str | None:
    """Text of the earliest answer in class `label`; None where there is none."""
    return next((a for i, a in zip(answer_ids, answers, strict=True) if i == label and a is not None), None)
