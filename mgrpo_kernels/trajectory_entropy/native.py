"""Launches of the compiled kernels: tensors to addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgrpo_kernels._common.native import address, as_fp32, code, contiguous, native


def _int64(cu_seqlens: Tensor | None) -> Tensor | None:
    """Contiguous boundaries, few beside the tokens."""
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()


def trajectory_entropy_fwd(tokens: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, mean: bool) -> Tensor:
    """See ops.py."""
    tokens, cu_seqlens, mask = tokens.contiguous(), _int64(cu_seqlens), contiguous(mask)
    sequences = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    entropy = tokens.new_empty(sequences, dtype=torch.float32)
    library, executor = native(tokens)
    library.trajectory_entropy_fwd(
        address(tokens),
        code(tokens.dtype),
        address(cu_seqlens),
        address(mask),
        sequences,
        tokens.shape[-1],
        mean,
        address(entropy),
        executor,
    )
    return entropy


def trajectory_entropy_bwd(
    dentropy: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    mean: bool,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """See ops.py."""
    upstream, cu_seqlens, mask = as_fp32(dentropy), _int64(cu_seqlens), contiguous(mask)
    dtokens = dentropy.new_empty(shape, dtype=dtype)
    library, executor = native(dentropy)
    library.trajectory_entropy_bwd(
        address(upstream),
        code(dtype),
        address(cu_seqlens),
        address(mask),
        dentropy.shape[0],
        shape[-1],
        mean,
        address(dtokens),
        executor,
    )
    return dtokens
