"""Clipped policy-gradient losses by Triton: terms, derivatives, metrics and sums in one read of each token tensor.

One launch, or two where the tokens are many or a sequence's statistics come first. Sums have a fixed order: lanes in
fp32, then in fp64 the program, and the programs, whose sums the one that ends last adds up. Parts: triton_tokens.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mgrpo_kernels._common.structs import LossInputs, LossOptions, RowBackward, RowInputs
from mgrpo_kernels._common.triton import Variant, variant
from mgrpo_kernels.grpo_loss.triton_tokens import grpo_loss_fwd_kernel, grpo_loss_parts_kernel
from mgrpo_kernels.ops import NUM_METRICS
from mgrpo_kernels.token_logprob.triton import token_logprob_bwd, token_logprob_fwd


class _Grid(NamedTuple):
    """Distribution of the tokens over programs; depends only on their number, and so does the order of sums."""

    programs: int
    block: int
    num_warps: int


# So many tokens take one multiprocessor some 3 us of arithmetic, about what a second launch costs.
_MOST_TOKENS_ALONE = 2048
# Four programs on each of the 132 multiprocessors of an H200, and one load of all their sums by the last.
_MOST_PROGRAMS = 512
_COUNT_BLOCK = 4096  # tokens that count as a part where no sequence's statistics are needed
_PART_WARPS = 8


def _grid(num_tokens: int, by_sequence: bool) -> _Grid:
    """Four tokens a thread."""
    if num_tokens <= _MOST_TOKENS_ALONE and not by_sequence:
        return _Grid(1, 2048, 16)
    return _Grid(min(max(triton.cdiv(num_tokens, 512), 1), _MOST_PROGRAMS), 512, 4)


def _blocks(grid: _Grid, alone: bool) -> dict[str, int]:
    """Sizes of the loss kernel: tokens, parts or, alone, tokens that it counts at a time, and programs."""
    return {"BT": grid.block, "BC": _COUNT_BLOCK if alone else 256, "BP": triton.next_power_of_2(grid.programs)}


def _pointer(tensor: Tensor | None) -> Tensor | None:
    """A contiguous tensor; a bool one as bytes."""
    if tensor is None:
        return None
    return tensor.contiguous().view(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()


def _launch(
    logprob: Tensor,
    entropy: Tensor | None,
    targets: Tensor | None,
    dlogprob: Tensor | None,
    dentropy: Tensor | None,
    inputs: LossInputs,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """Loss and metrics, and the gradients whose outputs are given."""
    num_tokens, num_sequences = inputs.mask.numel(), inputs.num_sequences
    length = inputs.mask.shape[1] if inputs.cu_seqlens is None else 0
    sequence_ratio, sequence_mean = options.ratio == "sequence", options.reduce == "sequence_mean_token_mean"
    denominator = options.denominator
    if denominator is None:
        num = max(num_sequences, 1) * ((options.max_length or 1) if options.reduce == "constant" else 1)
        denominator = 0.0 if options.reduce == "token_mean" else float(num)

    by_sequence = (sequence_ratio or sequence_mean) and num_sequences > 0
    grid = _grid(num_tokens, by_sequence)
    alone = grid.programs == 1 and not by_sequence
    num_parts = num_sequences if by_sequence else triton.cdiv(num_tokens, _COUNT_BLOCK)
    counts = inputs.mask.new_empty(1 + num_parts, dtype=torch.int32)
    means = inputs.mask.new_empty(max(num_parts, 1), dtype=torch.float32) if sequence_ratio else None
    advantage, mask, old, ref, rollout, cu_seqlens, normalizer = map(_pointer, inputs)
    targets = _pointer(targets)
    if not alone:
        kernel: Any = grpo_loss_parts_kernel
        kernel[(max(num_parts, 1),)](
            logprob if sequence_ratio else None,
            (logprob if old is None else old) if sequence_ratio else None,
            mask,
            targets,
            cu_seqlens if by_sequence else None,
            counts,
            means,
            num_tokens,
            length if by_sequence else _COUNT_BLOCK,
            BT=_COUNT_BLOCK,
            num_warps=_PART_WARPS,
        )
    loss = logprob.new_empty((), dtype=torch.float32)
    metrics = logprob.new_empty(NUM_METRICS, dtype=torch.float32)
    sums = logprob.new_empty(grid.programs * (1 + NUM_METRICS), dtype=torch.float64)
    kernel: Any = grpo_loss_fwd_kernel
    kernel[(grid.programs,)](
        *(logprob, entropy, old, ref, rollout, advantage, mask, targets, cu_seqlens, normalizer, counts, means),
        *(sums, loss, metrics, dlogprob, dentropy),
        *(num_tokens, num_sequences, num_parts, length, num_sequences.bit_length()),
        *(1 - options.clip_low, 1 + options.clip_high, options.dual_clip or 0.0),
        *(options.kl_coef, options.entropy_coef, options.tis_cap, denominator),
        KL=options.kl,
        ADVANTAGE_BY_TOKEN=not inputs.by_sequence,
        SEQUENCE_MEAN=sequence_mean,
        ALONE=alone,
        **_blocks(grid, alone),
        num_warps=grid.num_warps,
    )
    return loss, metrics


def grpo_loss_fwd(
    logprob: Tensor, entropy: Tensor | None, inputs: LossInputs, options: LossOptions, *needed: bool
) -> tuple[Tensor, ...]:
    """See ops.py; `needed` are dlogprob and dentropy."""
    gradients = [logprob.new_empty(logprob.shape if need else (0,), dtype=torch.float32) for need in needed]
    room = (gradient if need else None for gradient, need in zip(gradients, needed, strict=True))
    return *_launch(logprob.contiguous(), _pointer(entropy), None, *room, inputs, options), *gradients


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
    """See ops.py. A row is read twice and written once: its gradient needs the loss of its own token alone."""
    rows = RowInputs(logits, targets, inputs.mask, temperature, temperatures, 0.0)
    logprob, entropy, lse, _, _ = token_logprob_fwd(rows, False)
    dlogprob, dentropy = (logprob.new_empty(logits.shape[0] if needs_row_grads else 0) for _ in range(2))
    room = (dlogprob, dentropy) if needs_row_grads else (None, None)
    results = _launch(logprob, entropy, targets, *room, inputs, options)
    if needs_dlogits:
        entropy_grad = dentropy if options.entropy_coef else None
        given = RowBackward(logprob, entropy, lse, None, dlogprob, entropy_grad, None, None)
        dlogits = token_logprob_bwd(rows, given)
    else:
        dlogits = logits.new_empty((0, logits.shape[1]))
    return *results, logprob, entropy, lse, dlogprob, dentropy, dlogits


def variants() -> list[Variant]:
    """The kernels as the launchers start them."""
    floats = "logprob entropy old ref rollout advantage means loss metrics dlogprob dentropy"
    scalars = ("ratio_low", "ratio_high", "dual_clip", "kl_coef", "entropy_coef", "tis_cap", "denominator")
    counts = ("num_tokens", "num_sequences", "num_parts", "length", "search_steps")
    types = {f"p_{name}": "*fp32" for name in floats.split()} | dict.fromkeys(scalars, "fp32")
    types |= dict.fromkeys(counts, "i32") | {"p_mask": "*u8", "p_counts": "*i32", "p_sums": "*fp64"}
    types: dict[str, str | None] = types | {"p_normalizer": None}
    every = []
    for flag in (False, True):
        for packed in (False, True):
            given = types | {"p_cu_seqlens": "*i32" if packed else None}
            parts = given | {"p_targets": "*i64" if packed else None}
            parts |= {} if flag else dict.fromkeys(("p_logprob", "p_old", "p_means"))
            every.append(variant(grpo_loss_parts_kernel, parts, {"BT": _COUNT_BLOCK}, _PART_WARPS))
            given |= {"p_targets": None} | ({"p_means": None} if flag else {})
            grid = _grid(1 if flag else 2**20, by_sequence=not flag)
            constants = {"KL": "k3", "ADVANTAGE_BY_TOKEN": False, "SEQUENCE_MEAN": not flag, "ALONE": flag}
            constants |= _blocks(grid, flag)
            every.append(variant(grpo_loss_fwd_kernel, given, constants, grid.num_warps, aligned=("num_tokens",)))
    return every
