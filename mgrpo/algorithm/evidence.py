"""Quantities of rollouts that vote rules and rewards are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Quantities of a batch of rollouts, each [B, G]; None where no vote rule and no reward needs it.

    B prompts, G rollouts a prompt, of which the first M are the policy's.
    """

    answer_ids: torch.Tensor  # int64, class of the answer, -1 for none
    num_policy: int  # M
    # Both under the policy, of momentum rollouts too, at the sampling temperature; of a lost trajectory not finite.
    entropy: torch.Tensor | None = None  # fp32, mean token entropy, nats
    self_certainty: torch.Tensor | None = None  # fp32, mean of logsumexp(z) - mean(z) over tokens, at least 0
    correct: torch.Tensor | None = None  # bool, equals the true answer; never given to a vote rule

    @property
    def is_momentum(self) -> torch.Tensor:
        """[B, G] bool, rollouts of the momentum model."""
        return (torch.arange(self.answer_ids.shape[1]) >= self.num_policy).expand_as(self.answer_ids)
