"""Votes, from answers to pseudo-labels. A rule is added by a function and its row of VOTE_RULES, and its name in
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


@dataclass(frozen=True, kw_only=True)
class Vote:
    """The pseudo-label of each prompt and what led to it."""

    label: torch.Tensor  # [B] int64, class id; -1 where there is none
    share: torch.Tensor  # [B] fp32, votes of the label / votes
    tie: torch.Tensor  # [B] bool, before the tie rule
    class_share: torch.Tensor  # [B, G] fp32, share of each rollout's own class
    signal: torch.Tensor  # [B] bool, the label exists and its share and margin are large enough
    agreement: torch.Tensor  # [B] bool, policy and momentum rollouts elect the same class
    agreement_known: torch.Tensor  # [B] bool, both elect one


def majority(evidence: Evidence, voters: torch.Tensor, config: VoteConfig, backend: str) -> K.MajorityVote:
    """The class with most votes, of which a momentum rollout has `momentum_weight`.

    A tie goes to the class with more momentum votes, then to the class of the earliest rollout.
    """
    is_momentum = evidence.is_momentum
    weights = torch.where(is_momentum, config.momentum_weight, 1).to(torch.int32)
    return K.majority_vote(evidence.answer_ids, keep=voters, weights=weights, tie_break=is_momentum, backend=backend)


class VoteRule(NamedTuple):
    """A way to elect a pseudo-label."""

    elect: Callable[[Evidence, torch.Tensor, VoteConfig, str], K.MajorityVote]
    """From the evidence, the [B, G] bool rollouts that vote, the options and the backend of mgrpo_kernels."""
    needs: tuple[str, ...] = ()
    """Fields of Evidence that are computed for it alone; never `correct`."""


VOTE_RULES = {"majority": VoteRule(majority)}


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
