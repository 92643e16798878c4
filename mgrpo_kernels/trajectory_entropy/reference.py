"""Mean or sum of the token entropies of each trajectory: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels._common.segments import accumulation_dtype, segment_sum


def trajectory_entropy(token_entropy: Tensor, *, cu_seqlens: Tensor | None, mask: Tensor | None, reduce: str) -> Tensor:
    """See the public function."""
    values = token_entropy.to(accumulation_dtype(token_entropy))
    if cu_seqlens is not None:
        totals, counts = segment_sum(values, cu_seqlens), cu_seqlens.diff()
    else:
        assert mask is not None
        totals, counts = torch.where(mask, values, 0).sum(1), mask.sum(1)
    return totals if reduce == "sum" else totals / counts.clamp_min(1)
