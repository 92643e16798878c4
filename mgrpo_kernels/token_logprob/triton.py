"""Log-probability, entropy, log-sum-exp and self-certainty of rows of logits by Triton, and their gradient.

Forward: 2 B a bf16 logit, each read once; every thread keeps a running maximum and sums of its own elements, which are
combined once, after the loop. The vocabulary is split over programs by its size alone, so that a row's bits depend on
the row alone. Backward: one read and one write, in place if asked. A small kernel first computes seven numbers for each
row, because in place a row's target may be overwritten before another program needs it; the target's own gradient is
one of them, so that no column needs a test for the target. T rows, V columns.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mgrpo_kernels._common.native import as_fp32, contiguous
from mgrpo_kernels._common.rows import RowGrads
from mgrpo_kernels._common.structs import RowBackward, RowInputs
from mgrpo_kernels._common.triton import Variant, variant
from mgrpo_kernels.token_logprob.triton_rows import (
    BLOCKS_AHEAD,
    token_logprob_bwd_kernel,
    token_logprob_fwd_kernel,
    token_logprob_merge_kernel,
    token_logprob_rows_kernel,
)

_NUM_WARPS = 4
_THREADS = 32 * _NUM_WARPS
# Elements of a thread between two rescales, each of which costs a thirtieth.
_PER_THREAD = 32
_BLOCK = _THREADS * _PER_THREAD
# Few enough programs a row that their start and end vanish in 64 KiB of bf16, and enough for a few rows to fill a GPU.
_FORWARD_BLOCKS = 8
_BACKWARD_BLOCKS = 4
_BLOCK_ROWS = 128
_NUM_SUMS = 5
_NUM_NUMBERS = 7


class _Rows(NamedTuple):
    """First arguments of all kernels but the backward, in order."""

    logits: Tensor
    targets: Tensor
    mask: Tensor | None
    temperature: float
    temperatures: Tensor | None
    softcap: float
    stride: int
    vocabulary: int
    num_rows: int


def _rows(rows: RowInputs) -> _Rows:
    """The first arguments, with the sizes."""
    logits, targets, mask, temperature, temperatures, softcap = rows
    scale = (temperature, as_fp32(temperatures), softcap)
    return _Rows(
        logits, targets.contiguous(), contiguous(mask), *scale, logits.stride(0), logits.shape[1], logits.shape[0]
    )


def _vector(*matrices: Tensor) -> int:
    """Elements a thread can load and store at once, 16 bytes at most, at any row of the matrices."""
    most = 16 // min(matrix.element_size() for matrix in matrices)
    if any(matrix.data_ptr() % 16 for matrix in matrices):
        return 1
    return math.gcd(most, *(number for matrix in matrices for number in (matrix.shape[1], matrix.stride(0))))


def _split(vocabulary: int) -> tuple[int, int]:
    """Programs a row, and blocks a program; of V alone."""
    blocks = triton.cdiv(vocabulary, _BLOCK)
    each = triton.cdiv(blocks, triton.cdiv(blocks, _FORWARD_BLOCKS))
    return triton.cdiv(blocks, each), each


def _shape(blocks: int, vec: int) -> dict[str, int]:
    """A forward program's, with VEC elements in each load."""
    return {"BLOCKS": blocks, "L": _PER_THREAD // vec, "P": _THREADS, "VEC": vec}


def _forward(rows: _Rows, outputs: tuple[Tensor | None, ...], self_certainty: bool) -> None:
    """Fill the outputs, in the kernels' order."""
    if rows.num_rows == 0:
        return
    splits, blocks = _split(rows.vocabulary)
    partial = rows.logits.new_empty((_NUM_SUMS, splits, rows.num_rows), dtype=torch.float32) if splits > 1 else None
    options = {"SPLITS": splits, "CAPPED": rows.softcap > 0, "CERTAINTY": self_certainty}
    shape = _shape(blocks, _vector(rows.logits))
    kernel: Any = token_logprob_fwd_kernel
    kernel[(rows.num_rows * splits,)](*rows, partial, *outputs, **shape, **options, num_warps=_NUM_WARPS)
    if splits > 1:
        kernel = token_logprob_merge_kernel
        kernel[(triton.cdiv(rows.num_rows, _BLOCK_ROWS),)](
            *rows, partial, *outputs, BT=_BLOCK_ROWS, **options, num_warps=_BLOCK_ROWS // 32
        )


def token_logprob_fwd(rows: RowInputs, self_certainty: bool) -> tuple[Tensor, ...]:
    """See ops.py."""
    num_rows = rows.logits.shape[0]
    sizes = (num_rows,) * 3 + (num_rows if self_certainty else 0,) * 2
    outputs = tuple(rows.logits.new_empty(size, dtype=torch.float32) for size in sizes)
    certainty = outputs[3:] if self_certainty else (None, None)
    _forward(_rows(rows), (*outputs[:3], *certainty, *[None] * 5), self_certainty)
    return outputs


def row_sums(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    self_certainty: bool,
) -> tuple[Tensor, ...]:
    """RowSums of _common/rows.py, then z of the target, 0 where it lies outside [0, V); every row counts."""
    top, exp, exp_x, finite_x, num_finite, z_target = (
        logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(6)
    )
    rows = _rows(RowInputs(logits, targets, None, temperature, temperatures, softcap))
    _forward(rows, (*[None] * 4, num_finite, top, exp, exp_x, finite_x, z_target), self_certainty)
    return top, exp, exp_x, finite_x, num_finite, z_target


def _backward(rows: _Rows, dlogits: Tensor, *given: Tensor | None) -> None:
    """Fill dlogits, from saved results and upstream gradients, or from coefficients."""
    if rows.num_rows == 0:
        return
    numbers = rows.logits.new_empty((_NUM_NUMBERS, rows.num_rows), dtype=torch.float32)
    # An output that was not requested is empty, and so is its gradient in a compiled graph.
    values = [None if tensor is None or not tensor.numel() else as_fp32(tensor) for tensor in given]
    capped = rows.softcap > 0
    kernel: Any = token_logprob_rows_kernel
    kernel[(triton.cdiv(rows.num_rows, _BLOCK_ROWS),)](
        *rows, *values, numbers, BT=_BLOCK_ROWS, CAPPED=capped, num_warps=_BLOCK_ROWS // 32
    )
    programs = triton.cdiv(rows.vocabulary, _BACKWARD_BLOCKS * _BLOCK)
    kernel = token_logprob_bwd_kernel
    kernel[(rows.num_rows * programs,)](
        rows.logits,
        rows.stride,
        dlogits,
        dlogits.stride(0),
        rows.vocabulary,
        rows.num_rows,
        rows.targets,
        rows.softcap,
        numbers,
        PROGRAMS=programs,
        BLOCKS=_BACKWARD_BLOCKS,
        BLOCK=_BLOCK,
        VEC=_vector(rows.logits, dlogits),
        CAPPED=capped,
        UNIFORM=values[7] is not None or values[11] is not None,
        num_warps=_NUM_WARPS,
    )


def token_logprob_bwd(rows: RowInputs, given: RowBackward) -> Tensor:
    """See ops.py."""
    dlogits = rows.logits.new_empty(rows.logits.shape)
    _backward(_rows(rows), dlogits, *given, *[None] * 4)
    return dlogits


def token_logprob_bwd_(rows: RowInputs, given: RowBackward) -> None:
    """See ops.py."""
    _backward(_rows(rows), rows.logits, *given, *[None] * 4)


def row_gradient(
    logits: Tensor,
    dlogits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    lse: Tensor,
    coefficients: RowGrads,
) -> None:
    """Fill dlogits, which may be the logits, from log-sum-exp and coefficients; targets may lie outside [0, V)."""
    rows = _rows(RowInputs(logits, targets, None, temperature, temperatures, softcap))
    _backward(rows, dlogits, None, None, lse, *[None] * 5, *coefficients)


def variants() -> list[Variant]:
    """The kernels as the launchers start them, for a vocabulary of 151936."""
    integers = {"stride": "i64", "dstride": "i64", "vocabulary": "i32", "num_rows": "i32"}
    floats = (
        "partial logprob entropy lse certainty num_finite top exp exp_x finite_x z_target dlogprob dentropy dlse "
        "dcertainty constant onehot slope uniform numbers"
    )
    types: dict[str, str | None] = {f"p_{name}": "*fp32" for name in floats.split()} | integers
    types |= {"p_targets": "*i64", "p_mask": "*i1", "p_temperatures": None, "temperature": "fp32", "softcap": "fp32"}
    no_sums = dict.fromkeys(("p_top", "p_exp", "p_exp_x", "p_finite_x", "p_z_target"))
    no_results = dict.fromkeys(("p_logprob", "p_entropy", "p_lse", "p_certainty", "p_num_finite"))
    no_coefficients = dict.fromkeys(("p_constant", "p_onehot", "p_slope", "p_uniform"))
    splits, blocks = _split(151936)
    programs = triton.cdiv(151936, _BACKWARD_BLOCKS * _BLOCK)
    small, large, every = _BLOCK_ROWS // 32, _NUM_WARPS, []
    for kind, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        typed = types | {"p_logits": f"*{kind}"}
        shape, read = _shape(blocks, 16 // size), {"reads": BLOCKS_AHEAD * _PER_THREAD * size}
        for flag in (False, True):
            options = {"SPLITS": splits, "CAPPED": flag, "CERTAINTY": flag}
            every.append(variant(token_logprob_fwd_kernel, typed | no_sums, shape | options, large, **read))
            options |= {"BT": _BLOCK_ROWS}
            every.append(variant(token_logprob_merge_kernel, typed | no_sums, options, small))
        single = typed | {"p_partial": None, "p_mask": None} | no_results
        options = {"SPLITS": 1, "CAPPED": False, "CERTAINTY": False}
        every.append(variant(token_logprob_fwd_kernel, single, shape | options, large, **read))
        options = {"BT": _BLOCK_ROWS, "CAPPED": False}
        every.append(variant(token_logprob_rows_kernel, typed | no_coefficients, options, small))
        shape = {"PROGRAMS": programs, "BLOCKS": _BACKWARD_BLOCKS, "BLOCK": _BLOCK}
        outputs = [(kind, size, False), (kind, size, True)] + [("bf16", 2, False)] * (kind == "fp32")
        for written, written_size, flag in outputs:
            options = shape | {"VEC": 16 // written_size, "CAPPED": flag, "UNIFORM": flag}
            typed |= {"p_dlogits": f"*{written}"}
            writes = _PER_THREAD * written_size
            every.append(variant(token_logprob_bwd_kernel, typed, options, large, writes=writes, **read))
    return every
