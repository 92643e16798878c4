"""Gradients that raise an error when they are differentiated again.

A backward without grad mode returns a gradient detached from the inputs: if other terms keep a loss differentiable, its
second derivative would silently lack a part. `once_differentiable` detects that only if the upstream gradient requires
a gradient, and its error node is on no path to the inputs, so torch.autograd.grad skips it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Refusal(torch.autograd.Function):
    """The gradients, with edges to all that they depend on and a backward that raises."""

    @staticmethod
    def forward(ctx: Any, where: str, gradients: Sequence[Tensor | None], *sources: Tensor | None) -> Any:
        ctx.where = where
        # An alias, because views that a node returns cannot be written in place.
        return tuple(None if gradient is None else gradient.detach() for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(
            f"{ctx.where}: the gradient must be differentiated once, got a second backward through it. "
            "Write the loss in plain PyTorch for second derivatives, or detach the gradient."
        )


def once(where: str, gradients: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients for a backward to return; with create_graph, differentiating them with respect to `sources` raises.

    `sources` are the inputs and upstream gradients that they depend on. torch.compile raises by itself.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tuple(gradients)
    if not any(source is not None and source.requires_grad for source in sources):
        return tuple(gradients)
    return _Refusal.apply(where, gradients, *sources)  # pyright: ignore[reportReturnType]


class _Input(torch.autograd.Function):
    """Identity; saves its input, on which its gradient depends."""

    @staticmethod
    def forward(ctx: Any, where: str, tensor: Tensor) -> Tensor:
        ctx.where = where
        ctx.save_for_backward(tensor)
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *once(ctx.where, (upstream,), (*ctx.saved_tensors, upstream))


def once_input(where: str, tensor: Tensor) -> Tensor:
    """The tensor; a second backward through its gradient raises. For operations in plain PyTorch without a node."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and tensor.requires_grad):
        return tensor
    return _Input.apply(where, tensor)  # pyright: ignore[reportReturnType]
