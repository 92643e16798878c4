"""Launch of the compiled kernel: tensors to addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels._common.native import address, contiguous, native


def iqr_filter(
    entropy: Tensor, k: float, scope: str, keep: Tensor | None, two_sided: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.py."""
    entropy, keep = entropy.contiguous(), contiguous(keep)
    whole = scope == "batch"
    sizes = (1, entropy.numel()) if whole else entropy.shape
    kept = entropy.new_empty(entropy.shape, dtype=torch.bool)
    q1, q3 = (entropy.new_empty(() if whole else sizes[0]) for _ in range(2))
    library, executor = native(entropy)
    library.iqr_filter(
        address(entropy),
        address(keep),
        *sizes,
        k,
        two_sided,
        address(kept),
        address(q1),
        address(q3),
        executor,
    )
    return kept, q1, q3
