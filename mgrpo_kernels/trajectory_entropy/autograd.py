"""One autograd node over the forward and backward of any compiled backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dentropy: Tensor
    ) -> tuple[Tensor | None, ...]:
        cu_seqlens, mask = ctx.saved_tensors
        arguments = (dentropy, cu_seqlens, mask, ctx.mean, ctx.shape, ctx.dtype, ctx.backend)
        if dentropy.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dtokens = _Spread.apply(*arguments)
        else:
            dtokens = torch.ops.mgrpo_kernels.trajectory_entropy_bwd(*arguments)
        return dtokens, None, None, None, None  # pyright: ignore[reportReturnType]


class _Spread(torch.autograd.Function):
    """The backward, which is linear: its gradient is the forward, so derivatives of any order are correct."""

    @staticmethod
    def forward(
        ctx: Any, dentropy: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, mean: bool, *rest: Any
    ) -> Tensor:
        ctx.save_for_backward(cu_seqlens, mask)
        ctx.mean, ctx.backend = mean, rest[-1]
        return torch.ops.mgrpo_kernels.trajectory_entropy_bwd(dentropy, cu_seqlens, mask, mean, *rest)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        cu_seqlens, mask = ctx.saved_tensors
        return _apply(upstream, cu_seqlens, mask, ctx.mean, ctx.backend), *[None] * 6


def trajectory_entropy(
    token_entropy: Tensor, *, cu_seqlens: Tensor | None, mask: Tensor | None, reduce: str, backend: str
) -> Tensor:
    """See the public function."""
    return _apply(token_entropy, cu_seqlens, mask, reduce == "mean", backend)


def _apply(tokens: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, mean: bool, backend: str) -> Tensor:
    """Forward; its node, where nobody needs one, costs more than a short call."""
    if tokens.requires_grad and torch.is_grad_enabled():
        return _TrajectoryEntropy.apply(tokens, cu_seqlens, mask, mean, backend)  # pyright: ignore[reportReturnType]
    return torch.ops.mgrpo_kernels.trajectory_entropy_fwd(tokens, cu_seqlens, mask, mean, backend)
