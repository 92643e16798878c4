"""One autograd node for all four outputs, over the forward and backward of any compiled backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels import ops  # noqa: F401  (defines torch.ops.mgrpo_kernels)
from mgrpo_kernels._common.once import once
from mgrpo_kernels.results import TokenLogprob


class _TokenLogprob(torch.autograd.Function):
    """Saves the logits and one number a row and output."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        temperature: float,
        temperatures: Tensor | None,
        softcap: float,
        self_certainty: bool,
        inplace_backward: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        rows = (targets, mask, temperature, temperatures, softcap)
        outputs = torch.ops.mgrpo_kernels.token_logprob_fwd(logits, *rows, self_certainty, backend)
        logprob, entropy, lse, certainty, num_finite = outputs
        ctx.save_for_backward(logits, targets, mask, temperatures, logprob, entropy, lse, num_finite)
        ctx.temperature, ctx.softcap, ctx.backend = temperature, softcap, backend
        # A compiler's graph has no storage to write over.
        ctx.inplace = inplace_backward and not torch.compiler.is_compiling()
        ctx.set_materialize_grads(False)
        return logprob, entropy, lse, certainty

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, targets, mask, temperatures, logprob, entropy, lse, num_finite = ctx.saved_tensors
        rows = (targets, mask, ctx.temperature, temperatures, ctx.softcap)
        values = (logprob, entropy, lse, num_finite, *grads, ctx.backend)
        with torch.no_grad():
            if ctx.inplace:
                dlogits = logits.detach()
                torch.ops.mgrpo_kernels.token_logprob_bwd_(dlogits, *rows, *values)
                torch.autograd.graph.increment_version(dlogits)
            else:
                dlogits = torch.ops.mgrpo_kernels.token_logprob_bwd(logits, *rows, *values)
        return *once("token_logprob", (dlogits,), (logits, *grads)), *[None] * 8


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
    per_row = isinstance(temperature, Tensor)
    logprob, entropy, lse, certainty = _TokenLogprob.apply(
        logits,
        targets,
        mask,
        1.0 if per_row else float(temperature),
        temperature if per_row else None,
        softcap or 0.0,
        self_certainty,
        inplace_backward,
        backend,
    )
    return TokenLogprob(logprob, entropy, lse, certainty if self_certainty else None)
