"""Launch of the compiled kernel: tensors to addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels._common.checks import checks_values
from mgrpo_kernels._common.native import address, contiguous, native


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
        answer_ids.new_empty(prompts, dtype=torch.int64),
        answer_ids.new_empty(prompts, dtype=torch.float32),
        answer_ids.new_empty(prompts, dtype=torch.float32),
        answer_ids.new_empty(prompts, dtype=torch.bool),
        answer_ids.new_empty(answer_ids.shape, dtype=torch.float32),
        answer_ids.new_empty(2, dtype=torch.int64),
    )
    # On a GPU the least values need another launch, for a check that is off by default.
    used = outputs if checks_values(answer_ids.device) else outputs[:-1]
    library, executor = native(answer_ids)
    library.majority_vote(
        address(answer_ids),
        address(keep),
        address(weights),
        weights is not None and weights.dtype == torch.int64,
        address(tie_break),
        *answer_ids.shape,
        *[address(output) for output in used],
        *[0] * (len(outputs) - len(used)),
        executor,
    )
    return outputs
