"""Launches of the compiled CPU kernels: tensors to addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels._checks import IGNORED_TARGET
from mgrpo_kernels._native import address, as_fp32, contiguous, library
from mgrpo_kernels.ops import NUM_METRICS
from mgrpo_kernels.token_logprob.native import Rows

_KL_CODES = {"k1": 0, "k2": 1, "k3": 2}


class _Loss:
    """LossTokens and LossOptions of the library, and the tensors that must outlive them."""

    def __init__(
        self,
        logprob: Tensor,
        entropy: Tensor | None,
        advantage: Tensor,
        mask: Tensor,
        old_logprob: Tensor | None,
        ref_logprob: Tensor | None,
        rollout_logprob: Tensor | None,
        cu_seqlens: Tensor | None,
        normalizer: Tensor | None,
        *options: Any,
    ):
        num_sequences = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        by_sequence = advantage.dim() != mask.dim() or (cu_seqlens is not None and advantage.shape[0] == num_sequences)
        floats = (logprob, entropy, old_logprob, ref_logprob, rollout_logprob, advantage)
        boundaries = None if cu_seqlens is None else contiguous(cu_seqlens.to(torch.int64))
        self._kept = [*map(as_fp32, floats), mask.contiguous(), boundaries]
        addresses = [address(tensor) for tensor in self._kept]
        self.tokens: Any = library().LossTokens(
            *addresses[:6], not by_sequence, *addresses[6:], mask.numel(), num_sequences
        )
        self.options: Any = _options(num_sequences, normalizer, *options)


def _options(
    num_sequences: int,
    normalizer: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float,
    kl: str,
    entropy_coef: float,
    tis_cap: float,
    ratio: str,
    reduce: str,
    max_length: float | None,
    denominator: float | None,
) -> Any:
    """LossOptions of the library; a normalizer in either form replaces the denominator that `reduce` names."""
    count_tokens = False
    if normalizer is not None:
        denominator = normalizer.to(torch.float32).item()
    elif denominator is None:
        count_tokens = reduce == "token_mean"
        denominator = max(num_sequences, 1) * ((max_length or 1) if reduce == "constant" else 1)
    return library().LossOptions(
        1 - clip_low,
        1 + clip_high,
        dual_clip or 0.0,
        kl_coef,
        _KL_CODES[kl],
        entropy_coef,
        tis_cap,
        ratio == "sequence",
        reduce == "sequence_mean_token_mean",
        count_tokens,
        denominator,
    )


def _scalars() -> tuple[Tensor, Tensor]:
    """Room for the loss and the metrics."""
    return torch.empty((), dtype=torch.float32), torch.empty(NUM_METRICS, dtype=torch.float32)


def grpo_loss_fwd(logprob: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """See ops.py."""
    *inputs, needs_dlogprob, needs_dentropy = args
    loss = _Loss(logprob, *inputs)
    needed = (needs_dlogprob, needs_dentropy)
    gradients = [torch.empty(logprob.shape if need else (0,), dtype=torch.float32) for need in needed]
    outputs = (*_scalars(), *gradients)
    addresses = [address(output) for output in outputs[:2]]
    addresses += [address(gradient) if need else 0 for gradient, need in zip(gradients, needed, strict=True)]
    library().grpo_loss_fwd(loss.tokens, loss.options, *addresses, torch.get_num_threads())
    return outputs


def logits_grpo_loss_fwd(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    """See ops.py."""
    *inputs, needs_row_grads, needs_dlogits = args
    num_rows, vocabulary = logits.shape
    sizes = (num_rows,) * 3 + (num_rows if needs_row_grads else 0,) * 2
    logprob, entropy, lse, dlogprob, dentropy = (torch.empty(size, dtype=torch.float32) for size in sizes)
    dlogits = torch.empty((num_rows if needs_dlogits else 0, vocabulary), dtype=logits.dtype)
    rows = Rows(logits, targets, None, temperature, temperatures, 0.0)
    loss = _Loss(logprob, entropy, advantage, mask & (targets != IGNORED_TARGET), *inputs)
    outputs = (*_scalars(), logprob, entropy, lse, dlogprob, dentropy, dlogits)
    wanted = [True] * 5 + [needs_row_grads] * 2 + [needs_dlogits]
    addresses = [address(output) if want else 0 for output, want in zip(outputs, wanted, strict=True)]
    library().logits_grpo_loss_fwd(rows.pointers, loss.tokens, loss.options, *addresses, torch.get_num_threads())
    return outputs
