"""One autograd node over the forward and backward of any compiled backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mgrpo_kernels import ops  # noqa: F401  (defines torch.ops.mgrpo_kernels)


class _TrajectoryEntropy(torch.autograd.Function):
    """Saves the boundaries or the mask, never the tokens."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, mean: bool, backend: str
    ) -> Tensor:
        ctx.save_for_backward(cu_seqlens, mask)
        ctx.mean, ctx.shape, ctx.dtype, ctx.backend = mean, tokens.shape, tokens.dtype, backend
        return torch.ops.mgrpo_kernels.trajectory_entropy_fwd(tokens, cu_seqlens, mask, mean, backend)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dentropy: Tensor
    ) -> tuple[Tensor | None, ...]:
        cu_seqlens, mask = ctx.saved_tensors
        dtokens = torch.ops.mgrpo_kernels.trajectory_entropy_bwd(
            dentropy, cu_seqlens, mask, ctx.mean, ctx.shape, ctx.dtype, ctx.backend
        )
        return dtokens, None, None, None, None


def trajectory_entropy(
    token_entropy: Tensor, *, cu_seqlens: Tensor | None, mask: Tensor | None, reduce: str, backend: str
) -> Tensor:
    """See the public function."""
    arguments = (token_entropy, cu_seqlens, mask, reduce == "mean", backend)
    # The node costs more than a short call.
    if token_entropy.requires_grad and torch.is_grad_enabled():
        return _TrajectoryEntropy.apply(*arguments)  # pyright: ignore[reportReturnType]
    return torch.ops.mgrpo_kernels.trajectory_entropy_fwd(*arguments)
