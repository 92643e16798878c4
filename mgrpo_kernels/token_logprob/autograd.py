"""One autograd node for all four outputs, over the forward and backward of any compiled backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels import ops  # noqa: F401  (defines torch.ops.mgrpo_kernels)
from mgrpo_kernels._common.once import once
from mgrpo_kernels._common.structs import RowBackward, RowInputs
from mgrpo_kernels.results import TokenLogprob


class _TokenLogprob(torch.autograd.Function):
    """Saves the logits, and one number for each row and output."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *fields, self_certainty, inplace_backward, backend = args
        rows = RowInputs(*fields)
        outputs = torch.ops.mgrpo_kernels.token_logprob_fwd(*rows, self_certainty, backend)
        logprob, entropy, lse, certainty, num_finite = outputs
        ctx.save_for_backward(
            rows.logits, rows.targets, rows.mask, rows.temperatures, logprob, entropy, lse, num_finite
        )
        ctx.temperature, ctx.softcap, ctx.backend = rows.temperature, rows.softcap, backend
        # A compiled graph has no storage to overwrite.
        ctx.inplace = inplace_backward and not torch.compiler.is_compiling()
        ctx.set_materialize_grads(False)
        return logprob, entropy, lse, certainty

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, targets, mask, temperatures, *saved = ctx.saved_tensors
        rows = RowInputs(logits, targets, mask, ctx.temperature, temperatures, ctx.softcap)
        given = RowBackward(*saved, *grads)
        with torch.no_grad():
            if ctx.inplace:
                dlogits = logits.detach()
                torch.ops.mgrpo_kernels.token_logprob_bwd_(*rows._replace(logits=dlogits), *given, ctx.backend)
                torch.autograd.graph.increment_version(dlogits)
            else:
                dlogits = torch.ops.mgrpo_kernels.token_logprob_bwd(*rows, *given, ctx.backend)
        return *once("token_logprob", (dlogits,), (logits, *grads)), *[None] * 8


def split_scale(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    """The fields `temperature` and `temperatures` of RowInputs."""
    return (1.0, temperature) if isinstance(temperature, Tensor) else (float(temperature), None)


def token_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    mask: Tensor | None,
    softcap: float | None,
    self_certainty: bool,
    inplace_backward: bool,
    backend: str,
) -> TokenLogprob:
    """See the public function."""
    rows = RowInputs(logits, targets, mask, *split_scale(temperature), softcap or 0.0)
    outputs = _TokenLogprob.apply(*rows, self_certainty, inplace_backward, backend)
    logprob, entropy, lse, certainty = outputs
    return TokenLogprob(logprob, entropy, lse, certainty if self_certainty else None)
