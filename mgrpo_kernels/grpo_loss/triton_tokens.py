"""Device code of triton.py: the terms of a block of tokens, and sums of a fixed order.

T tokens, packed or padded alike; N sequences; S of a program's sums. "Parts" are sequences, or runs of tokens where
only the number of mask tokens is needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mgrpo_kernels._common.checks import IGNORED_TARGET
from mgrpo_kernels.ops import NUM_METRICS

_IGNORED = tl.constexpr(IGNORED_TARGET)
_LEAST_LOGPROB = tl.constexpr(-1e4)  # stands for -inf, so that two of them differ by 0
_NUM_SUMS = tl.constexpr(1 + NUM_METRICS)


@triton.jit
def _exponential(x):
    """(e^x, e^x - 1, e^x - 1 - x), the last two accurate near 0; e^x is inf above 88.7 and 0 below -104."""
    # x = n ln 2 + r: e^x - 1 = 2^n (r + r^2 Q(r)) + 2^n - 1, with Q the series of (e^r - 1 - r) / r^2.
    y = tl.where(x < -104.0, -104.0, x)
    y = tl.where(y > 89.0, 89.0, y)
    n = tl.floor(y * 1.4426950408889634 + 0.5)
    n = tl.where(n == n, n, 0.0)
    r = y - n * 0.693359375 + n * 2.12194440e-4
    q = r * 2.48015873e-5 + 1.98412698e-4
    q = q * r + 1.38888889e-3
    q = q * r + 8.33333333e-3
    q = q * r + 4.16666667e-2
    q = q * r + 1.66666667e-1
    q = q * r + 0.5
    tail = r * r * q
    p = r + tail
    # Two factors reach both ends of the range: n is in [-150, 128].
    whole = n.to(tl.int32)
    half = whole >> 1
    exp = (p + 1.0) * _power_of_2(half) * _power_of_2(whole - half)
    scale = _power_of_2(tl.where(tl.abs(x) < 40.0, whole, 0))
    expm1 = tl.where(tl.abs(x) < 40.0, scale * p + (scale - 1.0), exp - 1.0)
    return exp, expm1, tl.where(n == 0.0, tail, expm1 - x)


@triton.jit
def _power_of_2(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _clean(logprob, active):
    """Log-prob in fp32 with tokens outside the mask at 0 and -inf replaced by _LEAST_LOGPROB."""
    value = tl.where(active, logprob.to(tl.float32), 0.0)
    return tl.where(value < _LEAST_LOGPROB, _LEAST_LOGPROB, value)


@triton.jit
def _load_active(p_mask, p_targets, o_t, m_t):
    """Mask, less the tokens without a target."""
    active = tl.load(p_mask + o_t, mask=m_t, other=0) != 0
    if p_targets is not None:
        active = active & (tl.load(p_targets + o_t, mask=m_t, other=0) != _IGNORED)
    return active


@triton.jit
def _sequence_of(o_t, p_cu_seqlens, length, num_sequences, search_steps):
    """Index of the sequence of each token: by bisection, or of padded ones by division."""
    if p_cu_seqlens is None:
        sequence = o_t // length
    else:
        sequence = (o_t * 0).to(tl.int32)
        high = sequence + num_sequences
        for _ in range(search_steps):
            middle = (sequence + high) // 2
            narrows = high - sequence > 1
            right = tl.load(p_cu_seqlens + middle, mask=narrows, other=0).to(tl.int64) <= o_t
            sequence = tl.where(narrows & right, middle, sequence)
            high = tl.where(narrows & ~right, middle, high)
    return sequence


@triton.jit
def _token_terms(
    active, raw, old, log_ratio, advantage, ref, rollout, entropy, share, inverse, limits, KL: tl.constexpr
):  # fmt: skip
    """Summed terms of one or more tokens, then the two gradients. Follows reference.py line by line.

    A log-prob or entropy that is absent is None; old and log_ratio come cleaned.
    """
    ratio_low, ratio_high, dual_clip, kl_coef, entropy_coef, tis_cap = limits
    current = _clean(raw, active)
    ratio, _, _ = _exponential(log_ratio)
    clipped = tl.where(ratio < ratio_low, ratio_low, ratio)
    clipped = tl.where(clipped > ratio_high, ratio_high, clipped) * advantage
    product = ratio * advantage
    value = tl.where(clipped < product, clipped, product)
    value = tl.where(clipped == clipped, value, clipped)
    bound = advantage * dual_clip
    value = tl.where((dual_clip > 0.0) & (advantage < 0.0) & (value < bound), bound, value)
    moves = product == value
    surrogate = tl.where(moves, product, tl.where(advantage == 0.0, 0.0, value))
    slope = tl.where(moves, product, 0.0)

    weight = tl.zeros_like(current) + 1.0
    if rollout is not None:
        weight, _, _ = _exponential(old - _clean(rollout, active))
        capped = tl.where(weight > tis_cap, tis_cap, weight)
        surrogate = surrogate * capped
        slope = tl.where(moves, slope * capped, 0.0)
    loss = -surrogate
    dlogprob = -slope

    kl = tl.zeros_like(current)
    if ref is not None:
        gap = _clean(ref, active) - current
        if KL == "k1":
            kl = -gap
            dkl = tl.zeros_like(current) + 1.0
        elif KL == "k2":
            kl = gap * gap * 0.5
            dkl = -gap
        else:
            _, dkl, kl = _exponential(gap)
            dkl = -dkl
        # A coefficient of 0 leaves its term out, so that an infinite KL makes no 0 * inf.
        loss = tl.where(kl_coef > 0.0, loss + kl * kl_coef, loss)
        dlogprob = tl.where(kl_coef > 0.0, dlogprob + dkl * kl_coef, dlogprob)
    kept_entropy = tl.zeros_like(current)
    if entropy is not None:
        kept_entropy = tl.where(active, entropy.to(tl.float32), 0.0)
        loss = tl.where(entropy_coef != 0.0, loss - kept_entropy * entropy_coef, loss)

    live = active & (raw.to(tl.float32) >= _LEAST_LOGPROB)
    dlogprob = tl.where(live, dlogprob * (share * inverse), 0.0)
    dentropy = tl.where(active, share * (-entropy_coef * inverse), 0.0)
    low = active & (ratio < ratio_low) & (advantage < 0.0)
    high = active & (ratio > ratio_high) & (advantage > 0.0)
    above = weight > tis_cap
    return (
        tl.where(active, loss * share, 0.0),
        tl.where(active, ratio, 0.0),
        low.to(tl.float32),
        high.to(tl.float32),
        tl.where(active, kl, 0.0),
        kept_entropy,
        tl.where(active, tl.where(above, tis_cap, weight), 0.0),
        (active & above).to(tl.float32),
        dlogprob,
        dentropy,
    )


@triton.jit
def _part_sums(p_logprob, p_old, p_mask, p_targets, begin, end, BT: tl.constexpr):
    """Mask tokens from `begin` to `end`, and the sum of their log-ratios (0 without p_logprob)."""
    b_count = tl.zeros([BT], tl.int32)
    b_sum = tl.zeros([BT], tl.float32)
    for start in range(begin, end, BT):
        o_t = start + tl.arange(0, BT)
        m_t = o_t < end
        active = _load_active(p_mask, p_targets, o_t, m_t)
        b_count += active.to(tl.int32)
        if p_logprob is not None:
            current = _clean(tl.load(p_logprob + o_t, mask=m_t, other=0.0), active)
            b_sum += current - _clean(tl.load(p_old + o_t, mask=m_t, other=0.0), active)
    return tl.sum(b_count), tl.sum(b_sum.to(tl.float64))


@triton.jit
def _sum_counts(p_counts, num_parts, BC: tl.constexpr):
    """Number of mask tokens from those of the parts."""
    b_count = tl.zeros([BC], tl.int32)
    for start in range(0, num_parts, BC):
        o_part = start + tl.arange(0, BC)
        b_count += tl.load(p_counts + o_part, mask=o_part < num_parts, other=0)
    return tl.sum(b_count)


@triton.jit
def _denominator(num_active, p_normalizer, denominator):
    """What divides the sum; an argument of 0 stands for the number of mask tokens."""
    if p_normalizer is not None:
        return tl.load(p_normalizer).to(tl.float32).to(tl.float64)
    return tl.where(denominator > 0.0, denominator, tl.maximum(num_active, 1).to(tl.float32)).to(tl.float64)


@triton.jit
def _store_results(totals, o_sum, num_active, denominator, p_loss, p_metrics):
    """Loss and metrics from the sums of all tokens, in fp64."""
    divisor = tl.where(o_sum == 0, denominator, tl.maximum(num_active, 1).to(tl.float64))
    results = (totals / divisor).to(tl.float32)
    tl.store(p_loss + o_sum, results, mask=o_sum == 0)
    tl.store(p_metrics + (o_sum - 1), results, mask=o_sum > 0)


@triton.jit(do_not_specialize=["num_tokens", "length"])
def grpo_loss_parts_kernel(
    p_logprob,  # [T], or None where the ratio is the token's
    p_old,  # [T], or None with it
    p_mask,  # [T] bool
    p_targets,  # [T] int64 or None
    p_cu_seqlens,  # [N+1], or None for parts of one length
    p_counts,  # [1 + parts] out: the ticket, 0; mask tokens of each part
    p_means,  # [parts] out: mean log-ratio of each, or None
    num_tokens,
    length,
    BT: tl.constexpr,
):
    """Statistics that the loss of a token needs of other tokens, one program a part."""
    i_part = tl.program_id(0).to(tl.int64)
    if i_part == 0:
        tl.store(p_counts, 0)
    begin = i_part * length
    end = begin + length
    if p_cu_seqlens is not None:
        begin = tl.maximum(tl.load(p_cu_seqlens + i_part).to(tl.int64), 0)
        end = tl.load(p_cu_seqlens + i_part + 1).to(tl.int64)
    end = tl.minimum(end, num_tokens)
    count, log_ratios = _part_sums(p_logprob, p_old, p_mask, p_targets, begin, end, BT)
    tl.store(p_counts + 1 + i_part, count)
    if p_means is not None:
        tl.store(p_means + i_part, (log_ratios / tl.maximum(count, 1).to(tl.float64)).to(tl.float32))


@triton.jit(do_not_specialize=["num_sequences", "num_parts", "length", "search_steps"])
def grpo_loss_fwd_kernel(
    p_logprob,  # [T]
    p_entropy,  # [T] or None, as the next log-probs
    p_old,
    p_ref,
    p_rollout,
    p_advantage,  # [T] or [N]
    p_mask,  # [T] bool
    p_targets,  # [T] int64 or None
    p_cu_seqlens,  # [N+1], or None for sequences of one length
    p_normalizer,  # [1] or None
    p_counts,  # [1 + parts], see grpo_loss_parts_kernel; not read where ALONE
    p_means,  # [N], or None for the ratio of the token
    p_sums,  # [programs, S] fp64 scratch
    p_loss,  # [1] out
    p_metrics,  # [S - 1] out
    p_dlogprob,  # [T] out or None
    p_dentropy,  # [T] out or None
    num_tokens,
    num_sequences,
    num_parts,
    length,
    search_steps,
    ratio_low,
    ratio_high,
    dual_clip,
    kl_coef,
    entropy_coef,
    tis_cap,
    denominator,
    KL: tl.constexpr,
    ADVANTAGE_BY_TOKEN: tl.constexpr,
    SEQUENCE_MEAN: tl.constexpr,
    ALONE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """Blocks of BT tokens, dealt to the programs in turn; the program that ends last sums all of them."""
    i_program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    if ALONE:
        num_active, _ = _part_sums(None, None, p_mask, p_targets, 0, num_tokens, BC)
    else:
        num_active = _sum_counts(p_counts + 1, num_parts, BC)
    denominator = _denominator(num_active, p_normalizer, denominator)
    inverse = (1.0 / denominator).to(tl.float32)
    limits = (ratio_low, ratio_high, dual_clip, kl_coef, entropy_coef, tis_cap)
    b_sums = tl.zeros([BT, 2, 2, 2], tl.float32)
    for start in range(i_program.to(tl.int64) * BT, num_tokens, num_programs * BT):
        o_t = start + tl.arange(0, BT)
        m_t = o_t < num_tokens
        active = _load_active(p_mask, p_targets, o_t, m_t)
        raw = tl.load(p_logprob + o_t, mask=m_t, other=0.0).to(tl.float32)
        current = _clean(raw, active)
        old = current
        if p_old is not None:
            old = _clean(tl.load(p_old + o_t, mask=m_t, other=0.0), active)
        ref, rollout, entropy = None, None, None
        if p_ref is not None:
            ref = tl.load(p_ref + o_t, mask=m_t, other=0.0)
        if p_rollout is not None:
            rollout = tl.load(p_rollout + o_t, mask=m_t, other=0.0)
        if p_entropy is not None:
            entropy = tl.load(p_entropy + o_t, mask=m_t, other=0.0)
        o_n, m_n = o_t, m_t
        if not ADVANTAGE_BY_TOKEN or SEQUENCE_MEAN or p_means is not None:
            o_n = _sequence_of(o_t, p_cu_seqlens, length, num_sequences, search_steps)
            m_n = m_t & (o_n < num_sequences)
        if ADVANTAGE_BY_TOKEN:
            advantage = tl.load(p_advantage + o_t, mask=m_t, other=0.0).to(tl.float32)
        else:
            advantage = tl.load(p_advantage + o_n, mask=m_n, other=0.0).to(tl.float32)
        advantage = tl.where(active, advantage, 0.0)
        share = tl.zeros_like(current) + 1.0
        if SEQUENCE_MEAN:
            share = 1.0 / tl.maximum(tl.load(p_counts + 1 + o_n, mask=m_n, other=1), 1).to(tl.float32)
        log_ratio = current - old
        if p_means is not None:
            log_ratio = tl.load(p_means + o_n, mask=m_n, other=0.0) + (current - current)
        s0, s1, s2, s3, s4, s5, s6, s7, dlogprob, dentropy = _token_terms(
            active, raw, old, log_ratio, advantage, ref, rollout, entropy, share, inverse, limits, KL
        )
        if p_targets is not None:
            # Of a row of logits that is not valid; its gradient is NaN too.
            dlogprob = tl.where(active & (raw != raw), raw, dlogprob)
        if p_dlogprob is not None:
            tl.store(p_dlogprob + o_t, dlogprob, mask=m_t)
        if p_dentropy is not None:
            tl.store(p_dentropy + o_t, dentropy, mask=m_t)
        b_sums += tl.join(tl.join(tl.join(s0, s4), tl.join(s2, s6)), tl.join(tl.join(s1, s5), tl.join(s3, s7)))
    b_total = tl.sum(b_sums.to(tl.float64), 0)
    o_pair = tl.arange(0, 2)
    o_sum = o_pair[:, None, None] * 4 + o_pair[None, :, None] * 2 + o_pair[None, None, :]
    if ALONE:
        _store_results(b_total, o_sum, num_active, denominator, p_loss, p_metrics)
    else:
        tl.store(p_sums + i_program * _NUM_SUMS + o_sum, b_total)
        # The ticket follows the sums of every thread of the program.
        tl.debug_barrier()
        if tl.atomic_add(p_counts, 1, sem="acq_rel", scope="gpu") == num_programs - 1:
            o_p = tl.arange(0, BP)
            o_s = tl.arange(0, _NUM_SUMS)
            m_p = (o_p < num_programs)[:, None]
            b_parts = tl.load(p_sums + o_p[:, None] * _NUM_SUMS + o_s[None, :], mask=m_p, other=0.0)
            _store_results(tl.sum(b_parts, 0), o_s, num_active, denominator, p_loss, p_metrics)
