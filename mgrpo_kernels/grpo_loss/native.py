"""Launches of the compiled kernels: tensors to addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels._common.native import address, as_fp32, contiguous, native
from mgrpo_kernels._common.structs import LossInputs, LossOptions, RowInputs
from mgrpo_kernels.ops import NUM_METRICS
from mgrpo_kernels.token_logprob.native import Rows

# Tokens of one sum in the library, its kLossChunk.
_CHUNK = 1024
_KL_CODES = {"k1": 0, "k2": 1, "k3": 2}


class _Loss:
    """LossTokens, LossOptions and LossScratch of the library, with the tensors that must outlive them."""

    def __init__(self, logprob: Tensor, entropy: Tensor | None, inputs: LossInputs, options: LossOptions):
        mask, num_sequences, num_tokens = inputs.mask, inputs.num_sequences, inputs.mask.numel()
        floats = (logprob, entropy, inputs.old_logprob, inputs.ref_logprob, inputs.rollout_logprob, inputs.advantage)
        boundaries = None if inputs.cu_seqlens is None else contiguous(inputs.cu_seqlens.to(torch.int64))
        sums = mask.new_empty(-(-num_tokens // _CHUNK) * (1 + NUM_METRICS), dtype=torch.float64)
        sequences = mask.new_empty(2 * num_sequences, dtype=torch.float32)
        self._kept = [*map(as_fp32, floats), mask.contiguous(), boundaries, as_fp32(inputs.normalizer), sums, sequences]
        addresses = [address(tensor) for tensor in self._kept]
        self.library, self.executor = native(mask)
        self.tokens: Any = self.library.LossTokens(
            *addresses[:6], not inputs.by_sequence, *addresses[6:8], num_tokens, num_sequences
        )
        self.options: Any = self.library.LossOptions(*_options(num_sequences, options), addresses[8])
        self.scratch: Any = self.library.LossScratch(*addresses[9:])


def _options(num_sequences: int, options: LossOptions) -> tuple[Any, ...]:
    """LossOptions of the library; a given denominator replaces that of `reduce`."""
    denominator, count_tokens = options.denominator, False
    if denominator is None:
        count_tokens = options.reduce == "token_mean"
        denominator = max(num_sequences, 1) * ((options.max_length or 1) if options.reduce == "constant" else 1)
    return (
        1 - options.clip_low,
        1 + options.clip_high,
        options.dual_clip or 0.0,
        options.kl_coef,
        _KL_CODES[options.kl],
        options.entropy_coef,
        options.tis_cap,
        options.ratio == "sequence",
        options.reduce == "sequence_mean_token_mean",
        count_tokens,
        denominator,
    )


def _scalars(like: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the loss and the metrics."""
    return like.new_empty((), dtype=torch.float32), like.new_empty(NUM_METRICS, dtype=torch.float32)


def grpo_loss_fwd(
    logprob: Tensor, entropy: Tensor | None, inputs: LossInputs, options: LossOptions, *needed: bool
) -> tuple[Tensor, ...]:
    """See ops.py; `needed` are dlogprob and dentropy."""
    loss = _Loss(logprob, entropy, inputs, options)
    gradients = [logprob.new_empty(logprob.shape if need else (0,), dtype=torch.float32) for need in needed]
    outputs = (*_scalars(logprob), *gradients)
    addresses = [address(output) for output in outputs[:2]]
    addresses += [address(gradient) if need else 0 for gradient, need in zip(gradients, needed, strict=True)]
    loss.library.grpo_loss_fwd(loss.tokens, loss.options, loss.scratch, *addresses, loss.executor)
    return outputs


def logits_grpo_loss_fwd(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    inputs: LossInputs,
    options: LossOptions,
    needs_row_grads: bool,
    needs_dlogits: bool,
) -> tuple[Tensor, ...]:
    """See ops.py."""
    num_rows, vocabulary = logits.shape
    sizes = (num_rows,) * 3 + (num_rows if needs_row_grads else 0,) * 2
    logprob, entropy, lse, dlogprob, dentropy = (logits.new_empty(size, dtype=torch.float32) for size in sizes)
    dlogits = logits.new_empty((num_rows if needs_dlogits else 0, vocabulary))
    rows = Rows(RowInputs(logits, targets, None, temperature, temperatures, 0.0))
    loss = _Loss(logprob, entropy, inputs.with_targets(targets), options)
    outputs = (*_scalars(logits), logprob, entropy, lse, dlogprob, dentropy, dlogits)
    wanted = [True] * 5 + [needs_row_grads] * 2 + [needs_dlogits]
    addresses = [address(output) if want else 0 for output, want in zip(outputs, wanted, strict=True)]
    loss.library.logits_grpo_loss_fwd(rows.pointers, loss.tokens, loss.options, loss.scratch, *addresses, loss.executor)
    return outputs
