"""Majority vote over the answers of each prompt: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels.results import MajorityVote


def majority_vote(
    answer_ids: Tensor, *, keep: Tensor | None, weights: Tensor | None, tie_break: Tensor | None
) -> MajorityVote:
    """See the public function."""
    answered = answer_ids >= 0
    kept = torch.ones_like(answered) if keep is None else keep
    votes = kept.long() if weights is None else torch.where(kept, weights.long().clamp_min(0), 0)
    voters = answered & (votes > 0)
    preferred = torch.zeros_like(votes) if tie_break is None else torch.where(tie_break, votes, 0)

    same = answer_ids[:, :, None] == answer_ids[:, None, :]
    class_votes = (same * votes[:, None, :]).sum(2)
    class_preferred = (same * preferred[:, None, :]).sum(2)

    top = torch.where(voters, class_votes, 0).amax(1, keepdim=True)
    leaders = voters & (class_votes == top)
    top_preferred = torch.where(leaders, class_preferred, -1).amax(1, keepdim=True)
    winner = (leaders & (class_preferred == top_preferred)).int().argmax(1, keepdim=True)
    label = torch.where(voters.any(1), answer_ids.gather(1, winner).squeeze(1), -1)

    rivals = voters & (answer_ids != label[:, None])
    second = torch.where(rivals, class_votes, 0).amax(1)
    total = votes.sum(1).clamp_min(1)
    return MajorityVote(
        label=label,
        share=top.squeeze(1) / total,
        margin=(top.squeeze(1) - second) / total,
        tie=(leaders & rivals).any(1),
        class_share=torch.where(answered, class_votes, 0) / total[:, None],
    )
