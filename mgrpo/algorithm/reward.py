"""Rewards of rollouts, with no label but for `labels`.

Letters: B prompts, G rollouts a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mgrpo.algorithm.vote import Vote


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a reward may look at; each [B, G] or None where it was not computed."""

    answer_ids: torch.Tensor  # int64, class of the answer, -1 for none
    entropy: torch.Tensor  # fp32, mean token entropy, nats
    self_certainty: torch.Tensor | None = None  # fp32, mean of logsumexp(z) - mean(z)
    correct: torch.Tensor | None = None  # bool, equals the true answer


def reward(kind: str, vote: Vote, evidence: Evidence) -> torch.Tensor:
    """Rewards each rollout; by vote, prompts without signal get 0 everywhere, hence no gradient.

    Args:
        kind: "majority" (1 for the pseudo-label's class), "soft" (share of the own class, SRT and EMPO), "labels"
            (1 for the true answer), "self-certainty" (Intuitor, arXiv 2505.19590), "entropy" (negative, RENT).
        vote: the outcome of the vote.
        evidence: per-rollout quantities.

    Returns:
        [B, G] fp32.
    """
    if kind == "labels":
        assert evidence.correct is not None
        return evidence.correct.float()
    if kind == "self-certainty":
        assert evidence.self_certainty is not None
        return evidence.self_certainty
    if kind == "entropy":
        return -evidence.entropy
    if kind == "soft":
        rewards = vote.class_share
    else:
        rewards = ((evidence.answer_ids == vote.label[:, None]) & (evidence.answer_ids >= 0)).float()
    return rewards * vote.signal[:, None]
