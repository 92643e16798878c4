"""The three losses on any compiled backend: one autograd node each, or a chain of two.

The forward also computes the gradients, for an upstream gradient of 1; the backward multiplies them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels import ops  # noqa: F401  (defines torch.ops.mgrpo_kernels)
from mgrpo_kernels._common.once import once
from mgrpo_kernels._common.shards import Shard
from mgrpo_kernels._common.structs import LossInputs, LossOptions, RowBackward, RowInputs
from mgrpo_kernels.linear_token_logprob.active import mask_on_device
from mgrpo_kernels.linear_token_logprob.autograd import linear_token_logprob
from mgrpo_kernels.results import GrpoLoss
from mgrpo_kernels.token_logprob.autograd import split_scale, token_logprob

METRICS = ("ratio_mean", "clip_low_share", "clip_high_share", "kl", "entropy", "tis_mean", "tis_clipped_share")


def _is_one(upstream: Tensor) -> bool:
    """Whether the product with it can be omitted; known only on a CPU, without waiting for a device."""
    return upstream.device.type == "cpu" and not torch.compiler.is_compiling() and upstream.item() == 1


class _GrpoLoss(torch.autograd.Function):
    """Saves its own gradients."""

    @staticmethod
    def forward(ctx: Any, logprob: Tensor, entropy: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
        loss, metrics, dlogprob, dentropy = torch.ops.mgrpo_kernels.grpo_loss_fwd(logprob, entropy, *args)
        ctx.needed = args[-3:-1]
        ctx.save_for_backward(dlogprob, dentropy)
        # Not by save_for_backward: their values are not used and may be overwritten. A compiled graph cannot hold them.
        ctx.inputs = () if torch.compiler.is_compiling() else (logprob, entropy)
        ctx.dtypes = (logprob.dtype, logprob.dtype if entropy is None else entropy.dtype)
        ctx.num_others = len(args)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None, None]
        if upstream is not None:
            with torch.no_grad():
                one = _is_one(upstream)
                for i, (gradient, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
                    if ctx.needed[i]:
                        gradients[i] = (gradient if one else gradient * upstream).to(dtype)
        return *once("grpo_loss", gradients, (*ctx.inputs, upstream)), *[None] * ctx.num_others


class _LogitsGrpoLoss(torch.autograd.Function):
    """Returns dlogits of the forward in its first backward; a second one computes them again from the logits.

    With fp16 logits the first does too, because their gradients would underflow without the upstream loss scale.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        temperatures: Tensor | None,
        *args: Any,
    ) -> tuple[Tensor, Tensor]:
        *loss_args, needs_grad, backend = args
        mask = LossInputs(*loss_args[: len(LossInputs._fields)]).mask
        needs_dlogits = needs_grad and logits.dtype != torch.float16
        loss, metrics, logprob, entropy, lse, dlogprob, dentropy, dlogits = (
            torch.ops.mgrpo_kernels.logits_grpo_loss_fwd(
                logits, targets, temperature, temperatures, *loss_args, needs_grad, needs_dlogits, backend
            )
        )
        # Saved tensors of a compiled graph must not be overwritten.
        ctx.compiled = needs_dlogits and torch.compiler.is_compiling()
        if ctx.compiled:
            ctx.save_for_backward(dlogits)
        elif needs_grad:
            ctx.dlogits = dlogits if needs_dlogits else None
            ctx.save_for_backward(logits, targets, mask, temperatures, logprob, entropy, lse, dlogprob, dentropy)
        ctx.temperature, ctx.backend, ctx.num_others = temperature, backend, 3 + len(args)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, *[None] * ctx.num_others
        # Overwritten logits raise an error only if they are needed.
        saved: Any = ctx.saved_tensors if ctx.compiled or ctx.dlogits is None or torch.is_grad_enabled() else (None,)
        with torch.no_grad():
            if ctx.compiled:
                dlogits = saved[0] * upstream
            elif ctx.dlogits is None:
                dlogits = _dlogits_again(ctx, saved, upstream)
            else:
                dlogits, ctx.dlogits = ctx.dlogits, None
                if not _is_one(upstream):
                    dlogits.mul_(upstream)
        return *once("logits_grpo_loss", (dlogits,), (saved[0], upstream)), *[None] * ctx.num_others


def _dlogits_again(ctx: Any, saved: tuple[Tensor, ...], upstream: Tensor) -> Tensor:
    """Gradient of the logits from the forward's saved tensors."""
    logits, targets, mask, temperatures, logprob, entropy, lse, dlogprob, dentropy = saved
    rows = RowInputs(logits, targets, mask, ctx.temperature, temperatures, 0.0)
    given = RowBackward(logprob, entropy, lse, None, dlogprob * upstream, dentropy * upstream, None, None)
    return torch.ops.mgrpo_kernels.token_logprob_bwd(*rows, *given, ctx.backend)


def _constant(tensor: Tensor | None) -> Tensor | None:
    """The tensor detached, so that a node does not track gradients that it does not return."""
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor


def _constants(inputs: LossInputs) -> LossInputs:
    """The inputs, detached."""
    tensors: Any = map(_constant, inputs)
    return LossInputs(*tensors)


def _needs_grad(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def _result(loss: Tensor, metrics: Tensor) -> GrpoLoss:
    return GrpoLoss(loss, dict(zip(METRICS, metrics.unbind(), strict=True)))


def grpo_loss(
    logprob: Tensor, entropy: Tensor | None, inputs: LossInputs, options: LossOptions, *, backend: str
) -> GrpoLoss:
    """See the public function."""
    entropy = entropy if options.entropy_coef else _constant(entropy)
    needed = (_needs_grad(logprob), entropy is not None and _needs_grad(entropy))
    return _result(*_GrpoLoss.apply(logprob, entropy, *_constants(inputs), *options, *needed, backend))


def logits_grpo_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    inputs: LossInputs,
    options: LossOptions,
    backend: str,
) -> GrpoLoss:
    """See the public function. The ratio of a sequence needs all its log-probs before any gradient: two nodes."""
    if options.ratio == "sequence":
        rows = token_logprob(
            logits,
            targets,
            temperature=temperature,
            mask=inputs.mask,
            softcap=None,
            self_certainty=False,
            inplace_backward=False,
            backend=backend,
        )
        return grpo_loss(rows.logprob, rows.entropy, inputs.with_targets(targets), options, backend=backend)
    number, tensor = split_scale(temperature)
    scale, constants = (number, _constant(tensor)), _constants(inputs)
    return _result(*_LogitsGrpoLoss.apply(logits, targets, *scale, *constants, *options, _needs_grad(logits), backend))


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    budget_bytes: int | None,
    shard: Shard,
    inputs: LossInputs,
    options: LossOptions,
    backend: str,
) -> GrpoLoss:
    """See the public function."""
    rows = linear_token_logprob(
        hidden,
        weight,
        targets,
        bias=None,
        temperature=temperature,
        mask=inputs.mask,
        softcap=None,
        self_certainty=False,
        budget_bytes=budget_bytes,
        shard=shard,
        backend=backend,
    )
    inputs = inputs._replace(mask=mask_on_device("linear_grpo_loss", inputs.mask, hidden)).with_targets(targets)
    return grpo_loss(rows.logprob, rows.entropy, inputs, options, backend=backend)
