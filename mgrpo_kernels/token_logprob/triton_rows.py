"""Device code of triton.py for a row of logits or a block of rows.

T rows, V columns, S splits of V; z' is the softcapped logit, z = z' / temperature. `rows` are the arguments that every
kernel begins with: logits, targets, mask, temperature, temperatures, softcap, stride, V. `sums` of z' about a maximum:
the maximum, sum of e^x, of e^x x (x in base 2), of finite x, and the number of finite x.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from mgrpo_kernels._common.checks import IGNORED_TARGET

# Blocks that a program loads ahead. They are in shared memory and take no registers: with one a multiprocessor has some
# 60 KiB in flight, with two all that its shared memory holds.
BLOCKS_AHEAD = 2
_IGNORED = tl.constexpr(IGNORED_TARGET)
_LEAST = tl.constexpr(torch.finfo(torch.float32).min)  # a finite stand-in for the maximum of -inf
_FLOOR = tl.constexpr(-1000.0)  # 2^-1000 is exactly 0, and 0 times it too, where x is -inf
_STAGES = tl.constexpr(1 + BLOCKS_AHEAD)
_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _exponent(x):
    """Clamp x to the range of exp2; NaN stays NaN."""
    return tl.maximum(x, _FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _cap(z, softcap):
    """Softcap c tanh(z / c): (1 - e) / (1 + e) with e = exp(-2 |z / c|), near 0, where that cancels, its series."""
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
def _load_row(rows, o_t, m_t):
    """Target, whether it is a column, whether the row counts, and temperature."""
    _, p_targets, p_mask, temperature, p_temperatures, _, _, vocabulary = rows
    target = tl.load(p_targets + o_t, mask=m_t, other=_IGNORED)
    active = target != _IGNORED
    if p_mask is not None:
        active = active & (tl.load(p_mask + o_t, mask=m_t, other=0) != 0)
    if p_temperatures is not None:
        temperature = tl.load(p_temperatures + o_t, mask=m_t, other=1.0)
    return target, (target >= 0) & (target < vocabulary), active, temperature


@triton.jit
def _load_logits(p_logits, m_logits, other, softcap, CAPPED: tl.constexpr):
    """Softcapped logits in fp32; `other` outside the mask, not softcapped."""
    if m_logits is None:
        z = tl.load(p_logits, eviction_policy="evict_first").to(tl.float32)
        if CAPPED:
            z = _cap(z, softcap)
    else:
        z = tl.load(p_logits, mask=m_logits, other=other, eviction_policy="evict_first").to(tl.float32)
        if CAPPED:
            z = tl.where(m_logits, _cap(z, softcap), other)
    return z


@triton.jit
def _load_target(rows, o_t, target, m_target, CAPPED: tl.constexpr):
    """Softcapped logit of the target, 0 outside the mask."""
    p_logits, _, _, _, _, softcap, stride, _ = rows
    p_target = p_logits + o_t.to(tl.int64) * stride + tl.where(m_target, target, 0)
    return _load_logits(p_target, m_target, 0.0, softcap, CAPPED)


@triton.jit
def _no_sums(SIZE: tl.constexpr):
    zero = tl.zeros([SIZE], tl.float32)
    return tl.full([SIZE], _LEAST, tl.float32), zero, zero, zero, zero


@triton.jit
def _shift(sums, high, scale):
    """The same sums about a larger or equal maximum."""
    top, exp, exp_x, finite_x, num_finite = sums
    x = _exponent((top - high) * scale)
    weight = tl.exp2(x)
    finite_x = tl.where(num_finite > 0, finite_x + num_finite * (top - high), 0.0)
    return high, weight * exp, weight * (exp_x + exp * x), finite_x, num_finite


@triton.jit
def _add_block(sums, z, scale, L: tl.constexpr, P: tl.constexpr, VEC: tl.constexpr, CERTAINTY: tl.constexpr):
    """Sums [P] with a block of z' added; a thread has VEC adjacent elements, L times, and adds only its own."""
    z = tl.reshape(z, [L, P, VEC])
    high = tl.maximum(sums[0], tl.max(tl.max(z, 2), 0))
    _, exp, exp_x, finite_x, num_finite = _shift(sums, high, scale)
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
def _store_results(rows, o_t, m_t, row, sums, outputs, CAPPED: tl.constexpr, CERTAINTY: tl.constexpr):
    """Results of rows whose sums are complete, or with p_top the sums themselves."""
    p_logprob, p_entropy, p_lse, p_certainty, p_num_finite, p_top, p_exp, p_exp_x, p_finite_x, p_z_target = outputs
    target, inside, active, temperature = row
    top, exp, exp_x, finite_x, num_finite = sums
    z_target = _load_target(rows, o_t, target, m_t & inside & active, CAPPED)
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
    p_logits, p_targets, p_mask, temperature, p_temperatures, softcap, stride, vocabulary, num_rows, p_partial,
    p_logprob, p_entropy, p_lse, p_certainty, p_num_finite, p_top, p_exp, p_exp_x, p_finite_x, p_z_target,
    SPLITS: tl.constexpr, BLOCKS: tl.constexpr, L: tl.constexpr, P: tl.constexpr, VEC: tl.constexpr,
    CAPPED: tl.constexpr, CERTAINTY: tl.constexpr,
):  # fmt: skip
    """Sums of one split of one row: partial [5, S, T], or with a single split the results at once."""
    BLOCK: tl.constexpr = L * P * VEC
    stride = stride // VEC * VEC  # which tells the compiler what divides it
    vocabulary = vocabulary // VEC * VEC
    rows = (p_logits, p_targets, p_mask, temperature, p_temperatures, softcap, stride, vocabulary)
    i_t, i_split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    row = _load_row(rows, i_t, True)
    _, inside, active, temperature = row
    # With p_top all rows count: the target may be in another process's shard of the vocabulary.
    reads = True if p_top is not None else active & inside
    begin = i_split * (BLOCKS * BLOCK)
    end = tl.where(reads, tl.minimum(begin + BLOCKS * BLOCK, vocabulary), begin)
    whole = begin + (end - begin) // BLOCK * BLOCK
    p_row = p_logits + i_t.to(tl.int64) * stride
    o_v = tl.arange(0, BLOCK)
    scale = _LOG2E / temperature
    sums = _no_sums(P)
    for start in tl.range(begin, whole, BLOCK, num_stages=_STAGES):
        z = _load_logits(p_row + start + o_v, None, 0.0, softcap, CAPPED)
        sums = _add_block(sums, z, scale, L, P, VEC, CERTAINTY)
    if whole < end:
        z = _load_logits(p_row + whole + o_v, whole + o_v < end, float("-inf"), softcap, CAPPED)
        sums = _add_block(sums, z, scale, L, P, VEC, CERTAINTY)
    high = tl.max(sums[0], 0)
    _, exp, exp_x, finite_x, num_finite = _shift(sums, high, scale)
    sums = (high, tl.sum(exp, 0), tl.sum(exp_x, 0), tl.sum(finite_x, 0), tl.sum(num_finite, 0))
    if SPLITS > 1:
        p_split = p_partial + i_split.to(tl.int64) * num_rows + i_t
        for i in tl.static_range(5 if CERTAINTY else 3):
            tl.store(p_split + i * (num_rows.to(tl.int64) * SPLITS), sums[i])
    else:
        outputs = (
            p_logprob, p_entropy, p_lse, p_certainty, p_num_finite, p_top, p_exp, p_exp_x, p_finite_x, p_z_target
        )  # fmt: skip
        _store_results(rows, i_t, True, row, sums, outputs, CAPPED, CERTAINTY)


@triton.jit(do_not_specialize=["stride", "vocabulary", "num_rows"])
def token_logprob_merge_kernel(
    p_logits, p_targets, p_mask, temperature, p_temperatures, softcap, stride, vocabulary, num_rows, p_partial,
    p_logprob, p_entropy, p_lse, p_certainty, p_num_finite, p_top, p_exp, p_exp_x, p_finite_x, p_z_target,
    SPLITS: tl.constexpr, BT: tl.constexpr, CAPPED: tl.constexpr, CERTAINTY: tl.constexpr,
):  # fmt: skip
    """Results of rows from the sums of their splits, in the order of the splits."""
    rows = (p_logits, p_targets, p_mask, temperature, p_temperatures, softcap, stride, vocabulary)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    target, inside, active, temperature = _load_row(rows, o_t, m_t)
    temperature = tl.zeros([BT], tl.float32) + temperature
    scale = _LOG2E / temperature
    size = num_rows.to(tl.int64) * SPLITS
    sums = _no_sums(BT)
    for i_split in range(SPLITS):
        p_split = p_partial + i_split * num_rows.to(tl.int64) + o_t
        top = tl.load(p_split, mask=m_t, other=_LEAST)
        exp = tl.load(p_split + size, mask=m_t, other=0.0)
        exp_x = tl.load(p_split + 2 * size, mask=m_t, other=0.0)
        finite_x, num_finite = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
        if CERTAINTY:
            finite_x = tl.load(p_split + 3 * size, mask=m_t, other=0.0)
            num_finite = tl.load(p_split + 4 * size, mask=m_t, other=0.0)
        high = tl.maximum(sums[0], top)
        old = _shift(sums, high, scale)
        new = _shift((top, exp, exp_x, finite_x, num_finite), high, scale)
        sums = (high, old[1] + new[1], old[2] + new[2], old[3] + new[3], old[4] + new[4])
    row = (target, inside, active, temperature)
    outputs = (p_logprob, p_entropy, p_lse, p_certainty, p_num_finite, p_top, p_exp, p_exp_x, p_finite_x, p_z_target)
    _store_results(rows, o_t, m_t, row, sums, outputs, CAPPED, CERTAINTY)


@triton.jit
def _gradient(z, numbers, constant, peak, softcap, CAPPED: tl.constexpr, UNIFORM: tl.constexpr):
    """Gradient of z' of columns; of a target with its own constant and the peak."""
    anchor_z, anchor, scale, slope, uniform = numbers
    x = _exponent((z - anchor_z) * scale + anchor)
    dz = tl.exp2(x) * (x * slope + constant)
    if peak is not None:
        dz += peak
    if UNIFORM:
        dz -= tl.where(z == float("-inf"), 0.0, uniform)
    if CAPPED:
        tanh = z / softcap
        dz *= 1.0 - tanh * tanh
    return dz


@triton.jit(do_not_specialize=["stride", "vocabulary", "num_rows"])
def token_logprob_rows_kernel(
    p_logits, p_targets, p_mask, temperature, p_temperatures, softcap, stride, vocabulary, num_rows,
    p_logprob, p_entropy, p_lse, p_num_finite, p_dlogprob, p_dentropy, p_dlse, p_dcertainty,
    p_constant, p_onehot, p_slope, p_uniform, p_numbers,
    BT: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """The seven numbers [7, T] that token_logprob_bwd_kernel needs of a row, the target's own gradient the last.

    All that make a gradient are 0 where it is. From upstream gradients, or with p_constant from coefficients, whose
    targets may lie outside [0, V). The exponents are found about the target's log-prob, or minus log-sum-exp, whichever
    is smaller and so rounded less.
    """
    rows = (p_logits, p_targets, p_mask, temperature, p_temperatures, softcap, stride, vocabulary)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    target, inside, active, temperature = _load_row(rows, o_t, m_t)
    lse = tl.load(p_lse + o_t, mask=m_t, other=0.0)
    z_target = _load_target(rows, o_t, target, m_t & inside & active, CAPPED)
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
    complement = tl.where(logprob == float("-inf"), 1.0, _one_minus_exp(logprob))
    slope = tl.where(used, slope * (_LN2 * inverse), 0.0)
    uniform = tl.where(used, uniform * inverse, 0.0)
    numbers = (anchor_z, anchor * _LOG2E, zero + inverse * _LOG2E, slope, uniform)
    dz = _gradient(z_target, numbers, constant * inverse, onehot * complement * inverse, softcap, CAPPED, True)
    size = num_rows.to(tl.int64)
    for i in tl.static_range(5):
        tl.store(p_numbers + i * size + o_t, numbers[i], mask=m_t)
    tl.store(p_numbers + 5 * size + o_t, tl.where(used, (constant - onehot) * inverse, 0.0), mask=m_t)
    tl.store(p_numbers + 6 * size + o_t, tl.where(used & inside, dz, 0.0), mask=m_t)


@triton.jit
def _write_block(p_row, p_drow, m_v, numbers, constant, softcap, CAPPED: tl.constexpr, UNIFORM: tl.constexpr):
    """Gradient of a block of columns, none of them as a target's."""
    z = _load_logits(p_row, m_v, 0.0, softcap, CAPPED)
    dz = _gradient(z, numbers, constant, None, softcap, CAPPED, UNIFORM)
    tl.store(p_drow, dz.to(p_drow.dtype.element_ty), mask=m_v, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["stride", "dstride", "vocabulary", "num_rows"])
def token_logprob_bwd_kernel(
    p_logits, stride, p_dlogits, dstride, vocabulary, num_rows, p_targets, softcap, p_numbers,
    PROGRAMS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
    CAPPED: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Gradient [T, V] from the numbers of each row; a row where they are 0 is not read."""
    stride = stride // VEC * VEC  # which tells the compiler what divides it
    dstride = dstride // VEC * VEC
    vocabulary = vocabulary // VEC * VEC
    i_t, i_part = tl.program_id(0) // PROGRAMS, tl.program_id(0) % PROGRAMS
    p_number, size = p_numbers + i_t, num_rows.to(tl.int64)
    slope, uniform = tl.load(p_number + 3 * size), tl.load(p_number + 4 * size)
    constant, dz_target = tl.load(p_number + 5 * size), tl.load(p_number + 6 * size)
    numbers = (tl.load(p_number), tl.load(p_number + size), tl.load(p_number + 2 * size), slope, uniform)
    target = tl.load(p_targets + i_t)
    p_row, p_drow = p_logits + i_t.to(tl.int64) * stride, p_dlogits + i_t.to(tl.int64) * dstride
    begin = i_part * (BLOCKS * BLOCK)
    end = tl.minimum(begin + BLOCKS * BLOCK, vocabulary)
    o_v = tl.arange(0, BLOCK)
    if (slope != 0) | (uniform != 0) | (constant != 0) | (dz_target != 0):
        whole = begin + (end - begin) // BLOCK * BLOCK
        for start in tl.range(begin, whole, BLOCK, num_stages=_STAGES):
            p_z, p_dz = p_row + start + o_v, p_drow + start + o_v
            _write_block(p_z, p_dz, None, numbers, constant, softcap, CAPPED, UNIFORM)
        if whole < end:
            p_z, p_dz = p_row + whole + o_v, p_drow + whole + o_v
            _write_block(p_z, p_dz, whole + o_v < end, numbers, constant, softcap, CAPPED, UNIFORM)
        if (target >= begin) & (target < end):
            # After its own block was written.
            tl.debug_barrier()
            tl.store(p_drow + target, dz_target.to(p_dlogits.dtype.element_ty))
    else:
        zero = tl.zeros([BLOCK], p_dlogits.dtype.element_ty)
        for start in range(begin, end, BLOCK):
            tl.store(p_drow + start + o_v, zero, mask=start + o_v < end, eviction_policy="evict_first")
