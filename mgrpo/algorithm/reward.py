"""Rewards of rollouts. To add one, write a function, its row in REWARDS and its name in config/objective.py.

Letters: B prompts, G rollouts a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from mgrpo.algorithm.evidence import Evidence
from mgrpo.algorithm.vote import Vote


class Reward(NamedTuple):
    """A reward: [B, G] fp32 from the vote and the evidence."""

    compute: Callable[[Vote, Evidence], torch.Tensor]
    needs: tuple[str, ...] = ()
    """Fields of Evidence that are computed only for this reward."""


def agreement(vote: Vote, evidence: Evidence) -> torch.Tensor:
    """1 for the class of the pseudo-label; 0 in prompts without signal, hence no gradient."""
    agrees = (evidence.answer_ids == vote.label[:, None]) & (evidence.answer_ids >= 0)
    return agrees.float() * vote.signal[:, None]


def class_share(vote: Vote, evidence: Evidence) -> torch.Tensor:
    """Share of the votes for the rollout's own class (SRT and EMPO); 0 in prompts without signal."""
    return vote.class_share * vote.signal[:, None]


def correctness(vote: Vote, evidence: Evidence) -> torch.Tensor:
    """1 for the true answer; needs labels."""
    assert evidence.correct is not None
    return evidence.correct.float()


def self_certainty(vote: Vote, evidence: Evidence) -> torch.Tensor:
    """The policy's self-certainty (Intuitor, arXiv 2505.19590)."""
    assert evidence.self_certainty is not None
    return evidence.self_certainty


def negative_entropy(vote: Vote, evidence: Evidence) -> torch.Tensor:
    """Minus the mean token entropy (RENT, arXiv 2505.22660)."""
    assert evidence.entropy is not None
    return -evidence.entropy


REWARDS = {
    "majority": Reward(agreement),
    "soft": Reward(class_share),
    "labels": Reward(correctness, needs=("correct",)),
    "self-certainty": Reward(self_certainty, needs=("self_certainty",)),
    "entropy": Reward(negative_entropy),
}


def needs_labels(reward: str) -> bool:
    """Whether a reward reads true answers."""
    return "correct" in REWARDS[reward].needs
