"""Mean or sum of the token entropies of each trajectory by Triton, and its gradient: one launch each.

A sum's order depends on the sequence alone: a program a sequence walks its tokens in blocks whose lanes add up in fp32,
and the lanes in fp64. N sequences of packed tokens [T], or of padded ones [N, L].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgrpo_kernels._common.triton import Variant, variant

# Eight tokens a thread, for sixteen may spill: a response of 16 k tokens takes four turns, each a wait for memory.
_BLOCK, _NUM_WARPS = 4096, 16
_GATHER_BLOCK, _GATHER_WARPS = 1024, 4


@triton.jit
def _count(p_mask, begin, end, BT: tl.constexpr):
    """Tokens that the mask keeps."""
    b_count = tl.zeros([BT], tl.int32)
    for start in range(begin, end, BT):
        o_t = start + tl.arange(0, BT)
        b_count += (tl.load(p_mask + o_t, mask=o_t < end, other=0) != 0).to(tl.int32)
    return tl.sum(b_count)


# Without specialisation the layout of a block, and with it the order of a sum, is one.
@triton.jit(do_not_specialize=["num_tokens"])
def trajectory_entropy_fwd_kernel(
    p_tokens,  # [T] or [N, L]
    p_cu_seqlens,  # [N+1], or None for padded tokens
    p_mask,  # [N, L] bool, or None for packed ones
    p_entropy,  # [N] out
    num_tokens,  # T or L
    MEAN: tl.constexpr,
    BT: tl.constexpr,
):
    """One program a sequence; NaN for one whose boundaries lie outside the tokens."""
    i_sequence = tl.program_id(0).to(tl.int64)
    if p_cu_seqlens is None:
        begin = i_sequence * num_tokens
        end = begin + num_tokens
        valid = True
    else:
        begin = tl.load(p_cu_seqlens + i_sequence).to(tl.int64)
        end = tl.load(p_cu_seqlens + i_sequence + 1).to(tl.int64)
        valid = (begin >= 0) & (begin <= end) & (end <= num_tokens)
        end = tl.where(valid, end, begin)
    b_sum = tl.zeros([BT], tl.float32)
    b_count = tl.zeros([BT], tl.int32)
    for start in range(begin, end, BT):
        o_t = start + tl.arange(0, BT)
        m_t = o_t < end
        if p_mask is not None:
            m_t = m_t & (tl.load(p_mask + o_t, mask=m_t, other=0) != 0)
            b_count += m_t.to(tl.int32)
        b_sum += tl.load(p_tokens + o_t, mask=m_t, other=0.0).to(tl.float32)
    entropy = tl.sum(b_sum.to(tl.float64))
    if MEAN:
        count = end - begin if p_mask is None else tl.sum(b_count)
        entropy = entropy / tl.maximum(count, 1).to(tl.float64)
    tl.store(p_entropy + i_sequence, tl.where(valid, entropy, float("nan")).to(tl.float32))


@triton.jit(do_not_specialize=["length"])
def trajectory_entropy_padded_bwd_kernel(
    p_dentropy,  # [N]
    p_mask,  # [N, L] bool
    p_dtokens,  # [N, L] out
    length,
    MEAN: tl.constexpr,
    BT: tl.constexpr,
):
    """One program a sequence."""
    i_sequence = tl.program_id(0).to(tl.int64)
    begin = i_sequence * length
    end = begin + length
    each = tl.load(p_dentropy + i_sequence).to(tl.float64)
    if MEAN:
        each = each / tl.maximum(_count(p_mask, begin, end, BT), 1).to(tl.float64)
    each = each.to(tl.float32)
    for start in range(begin, end, BT):
        o_t = start + tl.arange(0, BT)
        m_t = o_t < end
        kept = tl.load(p_mask + o_t, mask=m_t, other=0) != 0
        tl.store(p_dtokens + o_t, tl.where(kept, each, 0.0).to(p_dtokens.dtype.element_ty), mask=m_t)


@triton.jit(do_not_specialize=["num_sequences", "search_steps"])
def trajectory_entropy_packed_bwd_kernel(
    p_dentropy,  # [N]
    p_cu_seqlens,  # [N+1]
    p_dtokens,  # [T] out
    num_tokens,
    num_sequences,
    search_steps,  # halvings that leave one of N sequences
    MEAN: tl.constexpr,
    BT: tl.constexpr,
):
    """One program a block of tokens, which look for their sequences by bisection; those of none get 0."""
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < num_tokens
    o_n = tl.zeros([BT], tl.int32)
    high = o_n + num_sequences
    for _ in range(search_steps):
        middle = (o_n + high) // 2
        narrows = high - o_n > 1
        right = tl.load(p_cu_seqlens + middle, mask=narrows, other=0).to(tl.int64) <= o_t
        o_n = tl.where(narrows & right, middle, o_n)
        high = tl.where(narrows & ~right, middle, high)
    m_n = m_t & (o_n < num_sequences)
    begin = tl.load(p_cu_seqlens + o_n, mask=m_n, other=0).to(tl.int64)
    end = tl.load(p_cu_seqlens + o_n + 1, mask=m_n, other=0).to(tl.int64)
    inside = m_n & (begin >= 0) & (begin <= o_t) & (o_t < end) & (end <= num_tokens)
    each = tl.load(p_dentropy + o_n, mask=inside, other=0.0).to(tl.float32)
    if MEAN:
        # The quotient in fp64 rounds to that of fp32.
        each = (each.to(tl.float64) / tl.where(inside, end - begin, 1).to(tl.float64)).to(tl.float32)
    tl.store(p_dtokens + o_t, each.to(p_dtokens.dtype.element_ty), mask=m_t)


def _bytes(mask: Tensor | None) -> Tensor | None:
    """The bytes of a mask, contiguous."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def trajectory_entropy_fwd(tokens: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, mean: bool) -> Tensor:
    """See ops.py."""
    num_sequences = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    entropy = tokens.new_empty(num_sequences, dtype=torch.float32)
    if num_sequences:
        kernel: Any = trajectory_entropy_fwd_kernel
        kernel[(num_sequences,)](
            tokens.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            _bytes(mask),
            entropy,
            tokens.shape[-1],
            MEAN=mean,
            BT=_BLOCK,
            num_warps=_NUM_WARPS,
        )
    return entropy


def trajectory_entropy_bwd(
    dentropy: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    mean: bool,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """See ops.py."""
    dtokens = dentropy.new_empty(shape, dtype=dtype)
    if not dtokens.numel():
        return dtokens
    dentropy = dentropy.contiguous()
    if cu_seqlens is None:
        kernel: Any = trajectory_entropy_padded_bwd_kernel
        kernel[(shape[0],)](dentropy, _bytes(mask), dtokens, shape[1], MEAN=mean, BT=_BLOCK, num_warps=_NUM_WARPS)
    else:
        num_sequences = cu_seqlens.shape[0] - 1
        kernel: Any = trajectory_entropy_packed_bwd_kernel
        kernel[(triton.cdiv(shape[0], _GATHER_BLOCK),)](
            dentropy,
            cu_seqlens.contiguous(),
            dtokens,
            shape[0],
            num_sequences,
            num_sequences.bit_length(),
            MEAN=mean,
            BT=_GATHER_BLOCK,
            num_warps=_GATHER_WARPS,
        )
    return dtokens


def variants() -> list[Variant]:
    """The kernels as the launchers start them."""
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        types = {"p_tokens": f"*{kind}", "p_dtokens": f"*{kind}", "p_entropy": "*fp32", "p_dentropy": "*fp32"}
        types |= dict.fromkeys(("num_tokens", "length", "num_sequences", "search_steps"), "i32")
        packed, padded = {"p_cu_seqlens": "*i32", "p_mask": None}, {"p_cu_seqlens": None, "p_mask": "*u8"}
        constants, gather = {"MEAN": True, "BT": _BLOCK}, {"MEAN": True, "BT": _GATHER_BLOCK}
        for given in (packed, padded):
            found.append(variant(trajectory_entropy_fwd_kernel, types | given, constants, _NUM_WARPS))
        found.append(variant(trajectory_entropy_padded_bwd_kernel, types | padded, constants, _NUM_WARPS))
        kernel = trajectory_entropy_packed_bwd_kernel
        found.append(variant(kernel, types | packed, gather, _GATHER_WARPS, aligned=("num_tokens",)))
    return found
