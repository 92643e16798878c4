"""Log-probability, entropy, log-sum-exp and self-certainty of rows of logits by Triton, and their gradient.

Forward: 2 B a bf16 logit, each read once; every thread keeps a running maximum and sums of its own elements, which
meet once, after the loop. The vocabulary is split over programs by its size alone, so that a row's bits depend on
nothing but the row. Backward: one read and one write, in place if asked. A small kernel first turns what is known of a
row into the numbers of a _Row, for in place a row's target may be overwritten before another program needs it.
T rows, V columns, S splits of V; z' is the softcapped logit, z = z' / temperature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgrpo_kernels._checks import IGNORED_TARGET
from mgrpo_kernels._native import as_fp32, contiguous
from mgrpo_kernels._rows import RowGrads
from mgrpo_kernels._triton import Variant, interprets

_NUM_WARPS = 4
_THREADS = 32 * _NUM_WARPS
# Elements a thread takes between two rescales: the rescale costs a thirtieth, and four 16-byte loads are in flight.
_PER_THREAD = 32
_BLOCK = _THREADS * _PER_THREAD
# Few enough programs a row that their start and end vanish in 64 KiB of bf16, and enough for a few rows to fill a GPU.
_FORWARD_BLOCKS = 8
_BACKWARD_BLOCKS = 4
_BLOCK_ROWS = 128
_NUM_SUMS = 5
_NUM_NUMBERS = 8

_IGNORED = tl.constexpr(IGNORED_TARGET)
_LEAST = tl.constexpr(torch.finfo(torch.float32).min)  # a finite stand-in for the maximum of -inf
_FLOOR = tl.constexpr(-1000.0)  # 2^-1000 is exactly 0, and 0 times it too, where x is -inf
_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _exponent(x):
    """X within reach of exp2; NaN stays."""
    return tl.maximum(x, _FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _cap(z, softcap):
    """C tanh(z / c): by (1 - e) / (1 + e) with e = exp(-2 |z / c|), and by its series near 0 where that cancels."""
    u = z / softcap
    a = tl.abs(u)
    e = tl.exp2(a * (-2.0 * _LOG2E))
    square = a * a
    series = square * 2.1869488e-2 - 5.3968254e-2
    series = series * square + 1.3333333e-1
    series = series * square - 3.3333333e-1
    magnitude = tl.where(a < 0.25, a + a * square * series, (1.0 - e) / (1.0 + e))
    return tl.where(u < 0, -magnitude, magnitude) * softcap


@triton.jit
def _one_minus_exp(x):
    """1 - e^x of x <= 0, without cancelling near 0."""
    series = 1.0 + x / 7.0
    series = 1.0 + x / 6.0 * series
    series = 1.0 + x / 5.0 * series
    series = 1.0 + x / 4.0 * series
    series = 1.0 + x / 3.0 * series
    series = 1.0 + x / 2.0 * series
    return tl.where(x > -0.25, -x * series, 1.0 - tl.exp2(_exponent(x * _LOG2E)))


@triton.jit
def _row_inputs(o_t, m_t, p_targets, p_mask, temperature, p_temperatures):
    """Target, whether the row counts, and temperature."""
    target = tl.load(p_targets + o_t, mask=m_t, other=_IGNORED)
    active = target != _IGNORED
    if p_mask is not None:
        active = active & (tl.load(p_mask + o_t, mask=m_t, other=0) != 0)
    if p_temperatures is not None:
        temperature = tl.load(p_temperatures + o_t, mask=m_t, other=1.0)
    return target, active, temperature


@triton.jit
def _load_logits(p_logits, m_logits, other, softcap, CAPPED: tl.constexpr):
    """Softcapped logits in fp32; what the mask leaves out is `other` as it is."""
    z = tl.load(p_logits, mask=m_logits, other=other, eviction_policy="evict_first").to(tl.float32)
    if CAPPED:
        z = tl.where(m_logits, _cap(z, softcap), other)
    return z


@triton.jit
def _shift(top, exp, exp_x, finite_x, num_finite, high, scale):
    """The same sums about a larger or equal maximum."""
    x = _exponent((top - high) * scale)
    weight = tl.exp2(x)
    finite_x = tl.where(num_finite > 0, finite_x + num_finite * (top - high), 0.0)
    return weight * exp, weight * (exp_x + exp * x), finite_x


@triton.jit
def _add_block(z, top, exp, exp_x, finite_x, num_finite, scale, CERTAINTY: tl.constexpr):
    """Sums [P] with a block [L, P, VEC] of z' added: no thread needs another."""
    high = tl.maximum(top, tl.max(tl.max(z, 2), 0))
    exp, exp_x, finite_x = _shift(top, exp, exp_x, finite_x, num_finite, high, scale)
    gap = z - high[None, :, None]
    x = _exponent(gap * scale)
    e = tl.exp2(x)
    exp += tl.sum(tl.sum(e, 2), 0)
    exp_x += tl.sum(tl.sum(e * x, 2), 0)
    if CERTAINTY:
        finite = z != float("-inf")
        finite_x += tl.sum(tl.sum(tl.where(finite, gap, 0.0), 2), 0)
        num_finite += tl.sum(tl.sum(finite.to(tl.float32), 2), 0)
    return high, exp, exp_x, finite_x, num_finite


@triton.jit
def _store_results(
    o_t, m_t, num_rows, p_logits, stride, vocabulary, target, active, temperature, softcap,
    top, exp, exp_x, finite_x, num_finite,
    p_logprob, p_entropy, p_lse, p_certainty, p_num_finite, p_top, p_exp, p_exp_x, p_finite_x, p_z_target,
    CAPPED: tl.constexpr, CERTAINTY: tl.constexpr,
):  # fmt: skip
    """Results of rows whose sums are complete, or with p_top the sums themselves."""
    inside = (target >= 0) & (target < vocabulary)
    o_target = o_t.to(tl.int64) * stride + tl.where(inside, target, 0)
    z_target = _load_logits(p_logits + o_target, m_t & inside & active, 0.0, softcap, CAPPED)
    exp_x = exp_x * _LN2
    finite_x = finite_x / temperature
    if p_top is not None:
        top = tl.maximum(top / temperature, _LEAST, propagate_nan=tl.PropagateNan.ALL)
        tl.store(p_top + o_t, top, mask=m_t)
        tl.store(p_exp + o_t, exp, mask=m_t)
        tl.store(p_exp_x + o_t, exp_x, mask=m_t)
        tl.store(p_finite_x + o_t, tl.where(num_finite > 0, finite_x, 0.0), mask=m_t)
        tl.store(p_z_target + o_t, z_target / temperature, mask=m_t)
    else:
        valid = inside & (temperature > 0) & (temperature < float("inf"))
        used = active & valid
        other = tl.where(active & ~valid, float("nan"), 0.0)
        log_exp = tl.log(exp)
        tl.store(p_logprob + o_t, tl.where(used, (z_target - top) / temperature - log_exp, other), mask=m_t)
        tl.store(p_entropy + o_t, tl.where(used, log_exp - exp_x / exp, other), mask=m_t)
        tl.store(p_lse + o_t, tl.where(used, top / temperature + log_exp, other), mask=m_t)
        if CERTAINTY:
            tl.store(p_certainty + o_t, tl.where(used, log_exp - finite_x / num_finite, other), mask=m_t)
    if p_num_finite is not None:
        tl.store(p_num_finite + o_t, num_finite, mask=m_t)


@triton.jit(do_not_specialize=["stride", "vocabulary", "num_rows"])
def token_logprob_fwd_kernel(
    p_logits, stride, vocabulary, num_rows, p_targets, p_mask, temperature, p_temperatures, softcap,
    p_partial, p_logprob, p_entropy, p_lse, p_certainty, p_num_finite,
    p_top, p_exp, p_exp_x, p_finite_x, p_z_target,
    SPLITS: tl.constexpr, BLOCKS: tl.constexpr, L: tl.constexpr, P: tl.constexpr, VEC: tl.constexpr,
    CAPPED: tl.constexpr, CERTAINTY: tl.constexpr,
):  # fmt: skip
    """Sums of one split of one row: partial [5, S, T], or with a single split the results at once."""
    BLOCK: tl.constexpr = L * P * VEC
    stride = stride // VEC * VEC  # which tells the compiler what divides it
    vocabulary = vocabulary // VEC * VEC
    i_t, i_split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    target, active, temperature = _row_inputs(i_t, True, p_targets, p_mask, temperature, p_temperatures)
    # With p_top all rows count: the target of one may lie in another process's share of the vocabulary.
    reads = True if p_top is not None else active & (target >= 0) & (target < vocabulary)
    begin = i_split * (BLOCKS * BLOCK)
    end = tl.where(reads, tl.minimum(begin + BLOCKS * BLOCK, vocabulary), begin)
    whole = begin + (end - begin) // BLOCK * BLOCK
    p_row = p_logits + i_t.to(tl.int64) * stride
    o_thread = tl.arange(0, P)[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    o_block = tl.arange(0, L)[:, None, None] * (P * VEC) + o_thread
    top = tl.full([P], _LEAST, tl.float32)
    exp = tl.zeros([P], tl.float32)
    exp_x, finite_x, num_finite = exp, exp, exp
    scale = _LOG2E / temperature
    for start in range(begin, whole, BLOCK):
        z = tl.load(p_row + start + o_block, eviction_policy="evict_first").to(tl.float32)
        if CAPPED:
            z = _cap(z, softcap)
        top, exp, exp_x, finite_x, num_finite = _add_block(z, top, exp, exp_x, finite_x, num_finite, scale, CERTAINTY)
    if whole < end:
        z = _load_logits(p_row + whole + o_block, whole + o_block < end, float("-inf"), softcap, CAPPED)
        top, exp, exp_x, finite_x, num_finite = _add_block(z, top, exp, exp_x, finite_x, num_finite, scale, CERTAINTY)
    high = tl.max(top, 0)
    exp, exp_x, finite_x = _shift(top, exp, exp_x, finite_x, num_finite, high, scale)
    exp, exp_x = tl.sum(exp, 0), tl.sum(exp_x, 0)
    finite_x, num_finite = tl.sum(finite_x, 0), tl.sum(num_finite, 0)
    if SPLITS > 1:
        p_split = p_partial + i_split.to(tl.int64) * num_rows + i_t
        size = num_rows.to(tl.int64) * SPLITS
        tl.store(p_split, high)
        tl.store(p_split + size, exp)
        tl.store(p_split + 2 * size, exp_x)
        if CERTAINTY:
            tl.store(p_split + 3 * size, finite_x)
            tl.store(p_split + 4 * size, num_finite)
    else:
        _store_results(
            i_t, True, num_rows, p_logits, stride, vocabulary, target, active, temperature, softcap,
            high, exp, exp_x, finite_x, num_finite,
            p_logprob, p_entropy, p_lse, p_certainty, p_num_finite, p_top, p_exp, p_exp_x, p_finite_x, p_z_target,
            CAPPED, CERTAINTY,
        )  # fmt: skip


@triton.jit(do_not_specialize=["stride", "vocabulary", "num_rows"])
def token_logprob_merge_kernel(
    p_logits, stride, vocabulary, num_rows, p_targets, p_mask, temperature, p_temperatures, softcap,
    p_partial, p_logprob, p_entropy, p_lse, p_certainty, p_num_finite,
    p_top, p_exp, p_exp_x, p_finite_x, p_z_target,
    SPLITS: tl.constexpr, BT: tl.constexpr, CAPPED: tl.constexpr, CERTAINTY: tl.constexpr,
):  # fmt: skip
    """Results of rows from the sums of their splits, in the order of the splits."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    target, active, temperature = _row_inputs(o_t, m_t, p_targets, p_mask, temperature, p_temperatures)
    temperature = tl.zeros([BT], tl.float32) + temperature
    scale = _LOG2E / temperature
    size = num_rows.to(tl.int64) * SPLITS
    top = tl.full([BT], _LEAST, tl.float32)
    exp = tl.zeros([BT], tl.float32)
    exp_x, finite_x, num_finite = exp, exp, exp
    for i_split in range(SPLITS):
        p_split = p_partial + i_split * num_rows.to(tl.int64) + o_t
        top_split = tl.load(p_split, mask=m_t, other=_LEAST)
        exp_split = tl.load(p_split + size, mask=m_t, other=0.0)
        exp_x_split = tl.load(p_split + 2 * size, mask=m_t, other=0.0)
        finite_x_split, num_split = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
        if CERTAINTY:
            finite_x_split = tl.load(p_split + 3 * size, mask=m_t, other=0.0)
            num_split = tl.load(p_split + 4 * size, mask=m_t, other=0.0)
        high = tl.maximum(top, top_split)
        exp, exp_x, finite_x = _shift(top, exp, exp_x, finite_x, num_finite, high, scale)
        exp_split, exp_x_split, finite_x_split = _shift(
            top_split, exp_split, exp_x_split, finite_x_split, num_split, high, scale
        )
        top, exp, exp_x = high, exp + exp_split, exp_x + exp_x_split
        finite_x, num_finite = finite_x + finite_x_split, num_finite + num_split
    _store_results(
        o_t, m_t, num_rows, p_logits, stride, vocabulary, target, active, temperature, softcap,
        top, exp, exp_x, finite_x, num_finite,
        p_logprob, p_entropy, p_lse, p_certainty, p_num_finite, p_top, p_exp, p_exp_x, p_finite_x, p_z_target,
        CAPPED, CERTAINTY,
    )  # fmt: skip


@triton.jit(do_not_specialize=["stride", "vocabulary", "num_rows"])
def token_logprob_rows_kernel(
    p_logits, stride, vocabulary, num_rows, p_targets, p_mask, temperature, p_temperatures, softcap,
    p_logprob, p_entropy, p_lse, p_num_finite, p_dlogprob, p_dentropy, p_dlse, p_dcertainty,
    p_constant, p_onehot, p_slope, p_uniform, p_numbers,
    BT: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """The eight numbers [8, T] that token_logprob_bwd_kernel needs of a row; all 0 where its gradient is.

    From upstream gradients, or with p_constant from coefficients, whose targets may lie outside [0, V). The exponents
    are found about the target's log-prob, or minus log-sum-exp, whichever is smaller and so rounded less.
    """
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    target, active, temperature = _row_inputs(o_t, m_t, p_targets, p_mask, temperature, p_temperatures)
    lse = tl.load(p_lse + o_t, mask=m_t, other=0.0)
    inside = (target >= 0) & (target < vocabulary)
    o_target = o_t.to(tl.int64) * stride + tl.where(inside, target, 0)
    z_target = _load_logits(p_logits + o_target, m_t & inside & active, 0.0, softcap, CAPPED)
    zero = tl.zeros([BT], tl.float32)
    constant, onehot, slope, uniform = zero, zero, zero, zero
    if p_constant is not None:
        active = m_t
        logprob = z_target / temperature - lse
        anchor_z, anchor = zero, -lse
        constant = tl.load(p_constant + o_t, mask=m_t, other=0.0)
        if p_onehot is not None:
            onehot = tl.load(p_onehot + o_t, mask=m_t, other=0.0)
            constant += onehot
        if p_slope is not None:
            slope = tl.load(p_slope + o_t, mask=m_t, other=0.0)
        if p_uniform is not None:
            uniform = tl.load(p_uniform + o_t, mask=m_t, other=0.0)
    else:
        logprob = tl.load(p_logprob + o_t, mask=m_t, other=0.0)
        by_target = -logprob < tl.abs(lse)
        anchor_z, anchor = tl.where(by_target, z_target, 0.0), tl.where(by_target, logprob, -lse)
        if p_dlogprob is not None:
            dlogprob = tl.load(p_dlogprob + o_t, mask=m_t, other=0.0)
            onehot = tl.where(logprob == float("-inf"), 0.0, dlogprob)
        if p_dentropy is not None:
            slope = -tl.load(p_dentropy + o_t, mask=m_t, other=0.0)
            constant += slope * tl.load(p_entropy + o_t, mask=m_t, other=0.0)
        if p_dlse is not None:
            constant += tl.load(p_dlse + o_t, mask=m_t, other=0.0)
        if p_dcertainty is not None:
            dcertainty = tl.load(p_dcertainty + o_t, mask=m_t, other=0.0)
            constant += dcertainty
            uniform = dcertainty / tl.maximum(tl.load(p_num_finite + o_t, mask=m_t, other=1.0), 1.0)
    inverse = 1.0 / temperature
    is_zero = (constant == 0) & (onehot == 0) & (slope == 0) & (uniform == 0)
    used = active & ~is_zero
    # A row whose forward is NaN has a gradient of NaN, in every column.
    constant = tl.where(lse == lse, constant, float("nan"))
    complement = tl.where(inside, _one_minus_exp(logprob), 1.0)
    complement = tl.where(logprob == float("-inf"), 1.0, complement)
    size = num_rows.to(tl.int64)
    tl.store(p_numbers + o_t, anchor_z, mask=m_t)
    tl.store(p_numbers + size + o_t, anchor * _LOG2E, mask=m_t)
    tl.store(p_numbers + 2 * size + o_t, zero + inverse * _LOG2E, mask=m_t)
    tl.store(p_numbers + 3 * size + o_t, tl.where(used, slope * (_LN2 * inverse), 0.0), mask=m_t)
    tl.store(p_numbers + 4 * size + o_t, tl.where(used, (constant - onehot) * inverse, 0.0), mask=m_t)
    tl.store(p_numbers + 5 * size + o_t, tl.where(used, constant * inverse, 0.0), mask=m_t)
    tl.store(p_numbers + 6 * size + o_t, tl.where(used, onehot * complement * inverse, 0.0), mask=m_t)
    tl.store(p_numbers + 7 * size + o_t, tl.where(used, uniform * inverse, 0.0), mask=m_t)


@triton.jit(do_not_specialize=["stride", "dstride", "vocabulary", "num_rows"])
def token_logprob_bwd_kernel(
    p_logits, stride, p_dlogits, dstride, vocabulary, num_rows, p_targets, softcap, p_numbers,
    PROGRAMS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
    CAPPED: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Gradient [T, V] from the numbers of each row; a row whose numbers are 0 is not read."""
    stride = stride // VEC * VEC  # which tells the compiler what divides it
    dstride = dstride // VEC * VEC
    vocabulary = vocabulary // VEC * VEC
    i_t, i_part = tl.program_id(0) // PROGRAMS, tl.program_id(0) % PROGRAMS
    size = num_rows.to(tl.int64)
    target = tl.load(p_targets + i_t)
    anchor_z = tl.load(p_numbers + i_t)
    anchor = tl.load(p_numbers + size + i_t)
    scale = tl.load(p_numbers + 2 * size + i_t)
    slope = tl.load(p_numbers + 3 * size + i_t)
    constant = tl.load(p_numbers + 4 * size + i_t)
    constant_target = tl.load(p_numbers + 5 * size + i_t)
    peak = tl.load(p_numbers + 6 * size + i_t)
    uniform = tl.load(p_numbers + 7 * size + i_t)
    is_used = (slope != 0) | (constant != 0) | (constant_target != 0) | (peak != 0) | (uniform != 0)
    num_read = tl.where(is_used, vocabulary, 0)
    p_row, p_drow = p_logits + i_t.to(tl.int64) * stride, p_dlogits + i_t.to(tl.int64) * dstride
    begin = i_part * (BLOCKS * BLOCK)
    # A target that no column of this program equals.
    target = tl.where((target >= begin) & (target < vocabulary), target, -1).to(tl.int32)
    for start in range(begin, tl.minimum(begin + BLOCKS * BLOCK, vocabulary), BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        m_v = o_v < vocabulary
        z = _load_logits(p_row + o_v, o_v < num_read, 0.0, softcap, CAPPED)
        x = _exponent((z - anchor_z) * scale + anchor)
        is_target = o_v == target
        dz = tl.exp2(x) * (x * slope + tl.where(is_target, constant_target, constant))
        dz += tl.where(is_target, peak, 0.0)
        if UNIFORM:
            dz -= tl.where(z == float("-inf"), 0.0, uniform)
        if CAPPED:
            tanh = z / softcap
            dz *= 1.0 - tanh * tanh
        dz = tl.where(o_v < num_read, dz, 0.0)
        tl.store(p_drow + o_v, dz.to(p_dlogits.dtype.element_ty), mask=m_v, eviction_policy="evict_first")


class _Inputs(NamedTuple):
    """What every kernel reads of the rows, in the kernels' order."""

    logits: Tensor
    stride: int
    vocabulary: int
    num_rows: int
    targets: Tensor
    mask: Tensor | None
    temperature: float
    temperatures: Tensor | None
    softcap: float


def _inputs(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
) -> _Inputs:
    """The same from the arguments of an operation."""
    num_rows, vocabulary = logits.shape
    return _Inputs(
        logits,
        logits.stride(0),
        vocabulary,
        num_rows,
        targets.contiguous(),
        contiguous(mask),
        temperature,
        as_fp32(temperatures),
        softcap,
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


def _forward(rows: _Inputs, outputs: tuple[Tensor | None, ...], self_certainty: bool) -> None:
    """Fill the outputs, in the kernels' order."""
    if rows.num_rows == 0:
        return
    splits, blocks = _split(rows.vocabulary)
    partial = rows.logits.new_empty((_NUM_SUMS, splits, rows.num_rows), dtype=torch.float32) if splits > 1 else None
    options = {"SPLITS": splits, "CAPPED": rows.softcap > 0, "CERTAINTY": self_certainty}
    vec = _vector(rows.logits)
    shape = {"BLOCKS": blocks, "L": _PER_THREAD // vec, "P": _THREADS, "VEC": vec}
    kernel: Any = token_logprob_fwd_kernel
    kernel[(rows.num_rows * splits,)](*rows, partial, *outputs, **shape, **options, num_warps=_NUM_WARPS)
    if splits > 1:
        kernel = token_logprob_merge_kernel
        kernel[(triton.cdiv(rows.num_rows, _BLOCK_ROWS),)](
            *rows, partial, *outputs, BT=_BLOCK_ROWS, **options, num_warps=_BLOCK_ROWS // 32
        )


def token_logprob_fwd(*args: Any) -> tuple[Tensor, ...]:
    """See ops.py."""
    *rows, self_certainty = args
    num_rows = args[0].shape[0]
    sizes = (num_rows,) * 3 + (num_rows if self_certainty else 0,) * 2
    outputs = tuple(args[0].new_empty(size, dtype=torch.float32) for size in sizes)
    certainty = outputs[3:] if self_certainty else (None, None)
    _forward(_inputs(*rows), (*outputs[:3], *certainty, *[None] * 5), self_certainty)
    return outputs


def row_sums(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    self_certainty: bool,
) -> tuple[Tensor, ...]:
    """RowSums of _rows.py, then z of the target, 0 where it lies outside [0, V); every row counts."""
    top, exp, exp_x, finite_x, num_finite, z_target = (
        logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(6)
    )
    rows = _inputs(logits, targets, None, temperature, temperatures, softcap)
    _forward(rows, (*[None] * 4, num_finite, top, exp, exp_x, finite_x, z_target), self_certainty)
    return top, exp, exp_x, finite_x, num_finite, z_target


def _backward(
    rows: _Inputs, dlogits: Tensor, saved: tuple[Tensor | None, ...], coefficients: tuple[Tensor | None, ...]
) -> None:
    """Fill dlogits, from what the forward saved and upstream gradients, or from coefficients."""
    if rows.num_rows == 0:
        return
    numbers = rows.logits.new_empty((_NUM_NUMBERS, rows.num_rows), dtype=torch.float32)
    # An output that was not asked for is empty, and so is the gradient that a compiler's graph gives it.
    values = [None if tensor is None or not tensor.numel() else as_fp32(tensor) for tensor in (*saved, *coefficients)]
    capped = rows.softcap > 0
    kernel: Any = token_logprob_rows_kernel
    kernel[(triton.cdiv(rows.num_rows, _BLOCK_ROWS),)](
        *rows, *values, numbers, BT=_BLOCK_ROWS, CAPPED=capped, num_warps=_BLOCK_ROWS // 32
    )
    programs = triton.cdiv(rows.vocabulary, _BACKWARD_BLOCKS * _BLOCK)
    # Triton's interpreter truncates what a GPU rounds to bf16.
    truncates = interprets() and dlogits.dtype == torch.bfloat16
    written = torch.empty_like(dlogits, dtype=torch.float32) if truncates else dlogits
    kernel = token_logprob_bwd_kernel
    kernel[(rows.num_rows * programs,)](
        rows.logits,
        rows.stride,
        written,
        written.stride(0),
        rows.vocabulary,
        rows.num_rows,
        rows.targets,
        rows.softcap,
        numbers,
        PROGRAMS=programs,
        BLOCKS=_BACKWARD_BLOCKS,
        BLOCK=_BLOCK,
        VEC=_vector(rows.logits, written),
        CAPPED=capped,
        UNIFORM=values[7] is not None or values[11] is not None,
        num_warps=_NUM_WARPS,
    )
    if truncates:
        dlogits.copy_(written)


def token_logprob_bwd(*args: Any) -> Tensor:
    """See ops.py."""
    dlogits = args[0].new_empty(args[0].shape)
    _backward(_inputs(*args[:6]), dlogits, args[6:], (None,) * 4)
    return dlogits


def token_logprob_bwd_(*args: Any) -> None:
    """See ops.py."""
    _backward(_inputs(*args[:6]), args[0], args[6:], (None,) * 4)


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
    rows = _inputs(logits, targets, None, temperature, temperatures, softcap)
    _backward(rows, dlogits, (None, None, lse, *[None] * 5), tuple(coefficients))


def _variant(
    kernel: Any, changed: Mapping[str, str | None], constants: dict[str, Any], warps: int, bound: bool
) -> Variant:
    """With the types of most launches; None for an absent argument."""
    numbers = {"stride": "i64", "dstride": "i64", "vocabulary": "i32", "num_rows": "i32"}
    types = numbers | {"p_targets": "*i64", "p_mask": "*i1", "temperature": "fp32", "softcap": "fp32"} | dict(changed)
    names = [name for name in kernel.arg_names if name not in constants]
    types = {name: types.get(name, "*fp32") for name in names}
    absent = {name: None for name, kind in types.items() if kind is None}
    signature = {name: types.get(name) or "constexpr" for name in kernel.arg_names}
    pointers = tuple(name for name, kind in types.items() if kind and kind[0] == "*")
    return Variant(kernel, signature, absent | constants, warps, pointers, bound)


def variants() -> list[Variant]:
    """The kernels as the launchers start them, for a vocabulary of 151936."""
    splits, blocks = _split(151936)
    sums = dict.fromkeys(("p_top", "p_exp", "p_exp_x", "p_finite_x", "p_z_target"))
    results = dict.fromkeys(("p_logprob", "p_entropy", "p_lse", "p_certainty", "p_num_finite"))
    plain: dict[str, Any] = {"p_temperatures": None}
    every = []
    for dtype, vec in (("*bf16", 8), ("*fp16", 8), ("*fp32", 4)):
        for capped, certainty in ((False, False), (True, True)):
            options = {"SPLITS": splits, "CAPPED": capped, "CERTAINTY": certainty}
            shape = {"BLOCKS": blocks, "L": _PER_THREAD // vec, "P": _THREADS, "VEC": vec}
            types = {"p_logits": dtype} | plain | sums
            every.append(_variant(token_logprob_fwd_kernel, types, shape | options, _NUM_WARPS, True))
            options["BT"] = _BLOCK_ROWS
            every.append(_variant(token_logprob_merge_kernel, types, options, _BLOCK_ROWS // 32, False))
        single = {"SPLITS": 1, "CAPPED": False, "CERTAINTY": False}
        types = {"p_logits": dtype, "p_partial": None, "p_mask": None} | plain | results
        every.append(_variant(token_logprob_fwd_kernel, types, shape | single, _NUM_WARPS, True))
        given = dict.fromkeys(("p_constant", "p_onehot", "p_slope", "p_uniform"))
        types = {"p_logits": dtype} | plain | given
        rows = {"BT": _BLOCK_ROWS, "CAPPED": False}
        every.append(_variant(token_logprob_rows_kernel, types, rows, _BLOCK_ROWS // 32, False))
        programs = triton.cdiv(151936, _BACKWARD_BLOCKS * _BLOCK)
        shape = {"PROGRAMS": programs, "BLOCKS": _BACKWARD_BLOCKS, "BLOCK": _BLOCK, "VEC": vec}
        for capped, uniform in ((False, False), (True, True)):
            types = {"p_logits": dtype, "p_dlogits": dtype}
            options = shape | {"CAPPED": capped, "UNIFORM": uniform}
            every.append(_variant(token_logprob_bwd_kernel, types, options, _NUM_WARPS, True))
    types = {"p_logits": "*fp32", "p_dlogits": "*bf16"}
    options = shape | {"VEC": 8, "CAPPED": False, "UNIFORM": False}
    return [*every, _variant(token_logprob_bwd_kernel, types, options, _NUM_WARPS, True)]
