"""Tensor operations of label-free reinforcement learning, importable with torch alone.

Letters used throughout: B prompts, G rollouts a prompt, N sequences, T packed tokens, L padded length, D hidden,
V vocabulary.
"""

from __future__ import annotations

from mgrpo_kernels.backends import backends
from mgrpo_kernels.ema_update.api import ema_update_
from mgrpo_kernels.group_advantage.api import group_advantage
from mgrpo_kernels.grpo_loss.api import grpo_loss, linear_grpo_loss, logits_grpo_loss
from mgrpo_kernels.iqr_filter.api import iqr_filter
from mgrpo_kernels.linear_token_logprob.api import linear_token_logprob
from mgrpo_kernels.majority_vote.api import majority_vote
from mgrpo_kernels.results import GrpoLoss, IqrFilter, MajorityVote, TokenLogprob
from mgrpo_kernels.token_logprob.api import token_logprob
from mgrpo_kernels.trajectory_entropy.api import trajectory_entropy

__all__ = [
    "GrpoLoss",
    "IqrFilter",
    "MajorityVote",
    "TokenLogprob",
    "backends",
    "ema_update_",
    "group_advantage",
    "grpo_loss",
    "iqr_filter",
    "linear_grpo_loss",
    "linear_token_logprob",
    "logits_grpo_loss",
    "majority_vote",
    "token_logprob",
    "trajectory_entropy",
]
