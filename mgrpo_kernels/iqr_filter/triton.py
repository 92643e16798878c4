"""Triton kernel: interquartile filter on trajectory entropy, one launch.

Fused: selection, both quartiles and the fence. A program takes a scope, a prompt or the whole batch. The quartiles are
selected bit by bit: the greatest number with no more than `rank` entries below it is the entry of that rank; its bits
are found from the top, a count of the entries each. Up to a tile the entries stay in registers; the rest is read again
from the cache. The same rank, interpolation and roundings as torch.quantile: hence no product is fused with a sum but
where torch.lerp does. B prompts, G rollouts a prompt.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgrpo_kernels._common.checks import invalid
from mgrpo_kernels._common.native import contiguous
from mgrpo_kernels._common.triton import Variant, variant

# One program reads them 34 times; and up to here 3/4 of a count is exact in fp32.
_MOST_ENTRIES = 2**20
# 16 entries a thread of 16 warps, which may have 128 registers each; 32 warps of 64 spill. Smaller tiles: 8 a thread.
_TILE, _MOST_WARPS = 8192, 16
_THREAD_ENTRIES = 8
_OPTIONS = {"enable_fp_fusion": False}
_INFINITY_BITS = tl.constexpr(0x7F800000)
_FEWEST = tl.constexpr(4)
_LEAST_IQR = tl.constexpr(1e-6)


@triton.jit
def _load(p_entropy, p_keep, o, size):
    """Entries at `o`, infinity for excluded ones."""
    m = o < size
    if p_keep is not None:
        m = m & (tl.load(p_keep + o, mask=m, other=0) != 0)
    return tl.load(p_entropy + o, mask=m, other=float("inf")), m


@triton.jit
def _number(key):
    """The number of an int64 key; keys have the order of their numbers, with NaN as infinity."""
    key = tl.minimum(tl.maximum(key, -_INFINITY_BITS - 1), _INFINITY_BITS).to(tl.int32)
    return tl.where(key >= 0, key, key ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _num_below(b_first, p_entropy, p_keep, size, q1, q3, TILE: tl.constexpr):
    """Counts of entries less than each of two numbers."""
    b_below1 = (b_first < q1).to(tl.int32)
    b_below3 = (b_first < q3).to(tl.int32)
    for start in range(TILE, size, TILE):
        b_entry, _ = _load(p_entropy, p_keep, start + tl.arange(0, TILE), size)
        b_below1 += (b_entry < q1).to(tl.int32)
        b_below3 += (b_entry < q3).to(tl.int32)
    return tl.sum(b_below1, 0), tl.sum(b_below3, 0)


@triton.jit
def _next(b_first, p_entropy, p_keep, size, low, rank, weight, TILE: tl.constexpr):
    """The entry of rank + 1, where `low` is that of the rank; `low` where it has no weight."""
    b_upto = (b_first <= low).to(tl.int32)
    b_above = tl.where(b_first > low, b_first, float("inf"))
    for start in range(TILE, size, TILE):
        b_entry, _ = _load(p_entropy, p_keep, start + tl.arange(0, TILE), size)
        b_upto += (b_entry <= low).to(tl.int32)
        b_above = tl.minimum(b_above, tl.where(b_entry > low, b_entry, float("inf")))
    return tl.where((weight == 0) | (tl.sum(b_upto, 0) > rank + 1), low, tl.min(b_above, 0))


@triton.jit
def _interpolate(low, high, weight):
    """torch.lerp, which rounds once."""
    near_low = weight < 0.5
    return tl.fma(tl.where(near_low, weight, weight - 1.0), high - low, tl.where(near_low, low, high))


@triton.jit(do_not_specialize=["size"])
def iqr_filter_kernel(
    p_entropy,  # [scopes, size]
    p_keep,  # the same, or None
    p_kept,  # [scopes, size]
    p_q1,  # [scopes]
    p_q3,  # [scopes]
    size,
    k,
    TWO_SIDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """One scope a program."""
    i_scope = tl.program_id(0).to(tl.int64)
    p_entropy += i_scope * size
    p_kept += i_scope * size
    if p_keep is not None:
        p_keep += i_scope * size
    o = tl.arange(0, TILE)
    b_first, m = _load(p_entropy, p_keep, o, size)
    b_used = m.to(tl.int32)
    b_wrong = (m & ~(tl.abs(b_first) < float("inf"))).to(tl.int32)
    for start in range(TILE, size, TILE):
        b_entry, m = _load(p_entropy, p_keep, start + o, size)
        b_used += m.to(tl.int32)
        b_wrong += (m & ~(tl.abs(b_entry) < float("inf"))).to(tl.int32)
    num_used = tl.sum(b_used, 0)
    is_defined = (num_used > 0) & (tl.sum(b_wrong, 0) == 0)

    last = tl.maximum(num_used - 1, 0).to(tl.float32)
    at1 = last * 0.25
    at3 = last * 0.75
    rank1 = tl.floor(at1).to(tl.int32)
    rank3 = tl.floor(at3).to(tl.int32)
    key1 = i_scope * 0 - 0x80000000
    key3 = key1
    bit = i_scope * 0 + 0x80000000
    for _ in range(32):
        below1, below3 = _num_below(b_first, p_entropy, p_keep, size, _number(key1 + bit), _number(key3 + bit), TILE)
        key1 += tl.where(below1 <= rank1, bit, 0)
        key3 += tl.where(below3 <= rank3, bit, 0)
        bit = bit >> 1
    low1 = _number(key1)
    low3 = _number(key3)
    weight1 = at1 - tl.floor(at1)
    weight3 = at3 - tl.floor(at3)
    q1 = _interpolate(low1, _next(b_first, p_entropy, p_keep, size, low1, rank1, weight1, TILE), weight1)
    q3 = _interpolate(low3, _next(b_first, p_entropy, p_keep, size, low3, rank3, weight3, TILE), weight3)
    q1 = tl.where(is_defined, q1, float("nan"))
    q3 = tl.where(is_defined, q3, float("nan"))
    tl.store(p_q1 + i_scope, q1)
    tl.store(p_q3 + i_scope, q3)

    iqr = q3 - q1
    drops = (num_used >= _FEWEST) & (iqr >= _LEAST_IQR)
    least = tl.where(drops, q1 - k * iqr, float("-inf"))
    greatest = tl.where(drops & TWO_SIDED, q3 + k * iqr, float("inf"))
    for start in range(0, size, TILE):
        b_entry, m = _load(p_entropy, p_keep, start + o, size)
        is_outside = (b_entry < least) | (b_entry > greatest)
        tl.store(p_kept + start + o, m & ~is_outside, mask=start + o < size)


def _sizes(size: int) -> tuple[int, int]:
    """Entries of a tile, warps."""
    tile = min(triton.next_power_of_2(max(size, 32)), _TILE)
    return tile, min(max(1, tile // (32 * _THREAD_ENTRIES)), _MOST_WARPS)


def iqr_filter(
    entropy: Tensor, k: float, scope: str, keep: Tensor | None, two_sided: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.py."""
    whole = scope == "batch"
    num_scopes, size = (1, entropy.numel()) if whole else entropy.shape
    if size > _MOST_ENTRIES:
        expected = f"of at most {_MOST_ENTRIES} entries a scope for backend 'triton'"
        raise invalid("iqr_filter", "entropy", expected, size, 'Pass backend="reference".')
    kept = entropy.new_empty(entropy.shape, dtype=torch.bool)
    q1, q3 = (entropy.new_empty(() if whole else num_scopes) for _ in range(2))
    tile, num_warps = _sizes(size)
    if num_scopes:
        iqr_filter_kernel[(num_scopes,)](
            entropy.contiguous(),
            contiguous(keep),
            kept,
            q1,
            q3,
            size,
            k,
            two_sided,
            tile,
            num_warps=num_warps,
            **_OPTIONS,
        )
    return kept, q1, q3


def variants() -> list[Variant]:
    """The kernel as the launcher starts it."""
    found = []
    for size, keep in ((32, None), (32, "*i1"), (1024, "*i1"), (4096, None), (65536, "*i1")):
        tile, num_warps = _sizes(size)
        types = {"p_entropy": "*fp32", "p_keep": keep, "p_kept": "*i1", "p_q1": "*fp32", "p_q3": "*fp32"}
        types |= {"size": "i32", "k": "fp32"}
        constants = {"TWO_SIDED": keep is not None, "TILE": tile}
        found.append(variant(iqr_filter_kernel, types, constants, num_warps, options=_OPTIONS))
    return found
