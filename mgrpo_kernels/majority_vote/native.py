"""Launch of the compiled CPU kernel: tensors to addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels._native import address, contiguous, library


def majority_vote(
    answer_ids: Tensor, keep: Tensor | None, weights: Tensor | None, tie_break: Tensor | None
) -> tuple[Tensor, ...]:
    """See ops.py."""
    answer_ids, keep, weights, tie_break = (
        answer_ids.contiguous(),
        contiguous(keep),
        contiguous(weights),
        contiguous(tie_break),
    )
    prompts = answer_ids.shape[0]
    outputs = (
        torch.empty(prompts, dtype=torch.int64),
        torch.empty(prompts, dtype=torch.float32),
        torch.empty(prompts, dtype=torch.float32),
        torch.empty(prompts, dtype=torch.bool),
        torch.empty(answer_ids.shape, dtype=torch.float32),
        torch.empty(2, dtype=torch.int64),
    )
    library().majority_vote(
        address(answer_ids),
        address(keep),
        address(weights),
        weights is not None and weights.dtype == torch.int64,
        address(tie_break),
        *answer_ids.shape,
        *[address(output) for output in outputs],
        torch.get_num_threads(),
    )
    return outputs
