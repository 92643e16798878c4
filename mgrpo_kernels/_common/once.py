"""Gradients that cannot be differentiated again, and say so.

A backward that runs without grad mode returns a gradient that is cut off from the inputs: where other terms keep a loss
differentiable, its second derivative would lack a part in silence. `once_differentiable` sees that only where the
upstream gradient requires a gradient, and its error lies on no way to the inputs, which torch.autograd.grad leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Refusal(torch.autograd.Function):
    """Gradients as they are, with an edge to all that they depend on and a backward that raises."""

    @staticmethod
    def forward(ctx: Any, where: str, gradients: Sequence[Tensor | None], *sources: Tensor | None) -> Any:
        ctx.where = where
        # An alias, which may be written in place, as views that a node returns may not.
        return tuple(None if gradient is None else gradient.detach() for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(
            f"{ctx.where}: the gradient must be differentiated once, got a second backward through it. "
            "Write the loss in plain PyTorch for second derivatives, or detach the gradient."
        )


def once(where: str, gradients: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients that a backward returns; a graph of them, where one is asked for, refuses to go back to `sources`.

    `sources` are the inputs and upstream gradients that they depend on. A compiler's graph refuses by itself.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tuple(gradients)
    if not any(source is not None and source.requires_grad for source in sources):
        return tuple(gradients)
    return _Refusal.apply(where, gradients, *sources)  # pyright: ignore[reportReturnType]


class _Input(torch.autograd.Function):
    """Saves itself, which is what its gradient depends on."""

    @staticmethod
    def forward(ctx: Any, where: str, tensor: Tensor) -> Tensor:
        ctx.where = where
        ctx.save_for_backward(tensor)
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *once(ctx.where, (upstream,), (*ctx.saved_tensors, upstream))


def once_input(where: str, tensor: Tensor) -> Tensor:
    """The tensor, whose gradient refuses a second backward: for operations in plain PyTorch, without a node of ours."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and tensor.requires_grad):
        return tensor
    return _Input.apply(where, tensor)  # pyright: ignore[reportReturnType]
