"""Triton kernel: the moving average of all tensors in one launch, by a table of descriptors on the device.

Fused: both casts, the blend, the rounding, the Kahan term and the copy for the rollout engine, in one read of momentum
and policy and one write of momentum (and of the copy). Random bits belong to elements, so nothing depends on the grid.

The table is built and pinned on the host once for a set of addresses, and copied by each call, asynchronously on the
call's stream: 56 bytes a tensor, 64 with offsets. A captured graph repeats the copy from the same pinned memory, which
is never freed; no device memory outlives the call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgrpo_kernels._common.triton import Variant, variant

# 16 elements a thread: 2 or 4 loads of 16 bytes of each list are in flight.
_BLOCK, _NUM_WARPS = 2048, 4
# A program finds its tensor by a search, some 1 us: 32 blocks hide it, where there are programs enough for 132
# multiprocessors of some 7 programs, eight times over.
_MOST_BLOCKS, _ENOUGH_PROGRAMS = 32, 8192
# Size of the cache of host tables: more than the models of a process, so that only changing addresses are rebuilt.
_MOST_TABLES = 16

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_KEEPS, _COPIES = 1, 2


@triton.jit
def _load(address, begin, o, m, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """fp32 of the elements from `begin` of a tensor; a whole block is at a multiple of 16 bytes."""
    p = address.to(tl.pointer_type(DTYPE)) + begin
    if WHOLE:
        return tl.load(tl.multiple_of(p, 16) + o).to(tl.float32)
    else:
        return tl.load(p + o, mask=m).to(tl.float32)


@triton.jit
def _store(address, begin, o, m, b_value, b_random, DTYPE: tl.constexpr, RANDOM: tl.constexpr, WHOLE: tl.constexpr):
    """Store fp32 values in DTYPE, to nearest or by random bits; returns what is kept of them."""
    if DTYPE == tl.bfloat16:
        # On the bits, also to nearest: the addition carries into the upper half, which is kept. A NaN must be quiet.
        bits = b_value.to(tl.uint32, bitcast=True)
        nearest = 0x7FFF + ((bits >> 16) & 1)
        finite = bits + (b_random if RANDOM else nearest)
        special = tl.where(b_value == b_value, bits, bits | 0x400000)
        bits = tl.where((bits & 0x7F800000) == 0x7F800000, special, finite) >> 16
        b_stored = bits.to(tl.uint16)
        b_kept = (bits << 16).to(tl.float32, bitcast=True)
        p = address.to(tl.pointer_type(tl.uint16)) + begin
    else:
        b_stored = b_value.to(DTYPE)
        b_kept = b_stored.to(tl.float32)
        p = address.to(tl.pointer_type(DTYPE)) + begin
    if WHOLE:
        tl.store(tl.multiple_of(p, 16) + o, b_stored)
    else:
        tl.store(p + o, b_stored, mask=m)
    return b_kept


@triton.jit
def _packed_bits(seed, quad, step, i_tensor):
    """Low 16 bits of the four words of each quad, the first lowest."""
    w0, w1, w2, w3 = tl.philox(seed, quad.to(tl.uint32), (quad >> 32).to(tl.uint32), step, i_tensor)
    low, high = (w1 << 16) | (w0 & 0xFFFF), (w3 << 16) | (w2 & 0xFFFF)
    return (high.to(tl.uint64) << 32) | low.to(tl.uint64)


@triton.jit
def _shifted_bits(element, seed, step, i_tensor, BLOCK: tl.constexpr):
    """As _random_bits, from any element of up to 64 bits on; packed, for all words would spill registers."""
    quad = (element >> 2) + tl.arange(0, BLOCK // 4).to(tl.uint64)
    bits = _packed_bits(seed, quad, step, i_tensor)
    shift = (element & 3) << 4
    if shift != 0:
        bits = (bits >> shift) | (_packed_bits(seed, quad + 1, step, i_tensor) << (64 - shift))
    low, high = bits.to(tl.uint32), (bits >> 32).to(tl.uint32)
    even, odd = tl.interleave(low & 0xFFFF, high & 0xFFFF), tl.interleave(low >> 16, high >> 16)
    return tl.interleave(even, odd)


@triton.jit
def _random_bits(begin, seed, step, i_tensor, BLOCK: tl.constexpr):
    """Low 16 bits of the words of the elements from `begin`, a multiple of BLOCK, as rounding.py defines them."""
    quad = tl.cast(begin, tl.int64) // 4
    # The low word of a quad does not wrap within a block, whose size is a power of two.
    c0 = quad.to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, (quad >> 32).to(tl.uint32), step, i_tensor)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)) & 0xFFFF


@triton.jit
def _update(
    addresses,
    begin,
    end,
    i_tensor,
    blend,
    seed,
    step,
    offset,
    KIND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of the elements from `begin` of a tensor."""
    MOMENTUM: tl.constexpr = KIND[0]
    POLICY: tl.constexpr = KIND[1]
    COMPENSATED: tl.constexpr = KIND[2] != tl.int8
    PUBLISH: tl.constexpr = KIND[3]
    RANDOM: tl.constexpr = STOCHASTIC and MOMENTUM == tl.bfloat16
    momentum, policy, compensation, publish = addresses
    keeps, copies, from_old, coefficient = blend
    o = tl.arange(0, BLOCK)
    m = o < end - begin
    b_old = _load(momentum, begin, o, m, MOMENTUM, WHOLE)
    b_new = _load(policy, begin, o, m, POLICY, WHOLE)
    b_whole = b_old
    if COMPENSATED:
        b_term = _load(compensation, begin, o, m, tl.bfloat16, WHOLE)
        b_whole = b_old + b_term
    b_mixed = tl.fma(b_new - b_whole, coefficient, tl.where(from_old, b_whole, b_new))
    b_mixed = tl.where(keeps, b_old, tl.where(copies, b_new, b_mixed))
    b_random = 0
    if RANDOM:
        if offset is None:
            b_random = _random_bits(begin, seed, step, i_tensor, BLOCK)
        else:
            b_random = _shifted_bits(offset + tl.cast(begin, tl.uint64), seed, step, i_tensor, BLOCK)
    b_kept = _store(momentum, begin, o, m, b_mixed, b_random, MOMENTUM, RANDOM, WHOLE)
    if COMPENSATED:
        b_term = tl.where(keeps, b_term, b_mixed - b_kept)
        _store(compensation, begin, o, m, b_term, 0, tl.bfloat16, False, WHOLE)
    if PUBLISH != tl.int8:
        _store(publish, begin, o, m, b_kept, 0, PUBLISH, False, WHOLE)


@triton.jit(
    do_not_specialize=("num_tensors", "span", "share", "end_of_range", "seed_low", "seed_high", "step_low"),
)
def ema_update_kernel(
    p_table,  # int64 [7 or 8, num_tensors]: see _Table
    num_tensors,
    span,
    share,
    end_of_range,
    p_decay,
    seed_low,
    seed_high,
    step_low,
    p_step,
    KINDS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A span of one tensor: its whole blocks where all is aligned, then the rest, masked, in smaller ones.

    A masked block loads element by element: a large one would take twice the registers of the others.
    """
    i_span = tl.program_id(0)
    # The last tensor that starts at or before the span.
    i_tensor = i_span * 0
    after = i_tensor + num_tensors
    while after - i_tensor > 1:
        middle = (i_tensor + after) // 2
        is_before = tl.load(p_table + 5 * num_tensors + middle) <= i_span
        i_tensor = tl.where(is_before, middle, i_tensor)
        after = tl.where(is_before, after, middle)
    p_own = p_table + i_tensor
    momentum = tl.load(p_own)
    policy = tl.load(p_own + num_tensors)
    compensation = tl.load(p_own + 2 * num_tensors)
    publish = tl.load(p_own + 3 * num_tensors)
    count = tl.load(p_own + 4 * num_tensors)
    begin = (i_span - tl.load(p_own + 5 * num_tensors)) * span
    kind = tl.load(p_own + 6 * num_tensors)
    end = tl.minimum(begin + span, count)
    offset = None
    if OFFSETS:
        offset = tl.load(p_own + 7 * num_tensors).to(tl.uint64)

    if p_decay is None:
        keeps = end_of_range == 1
        copies = end_of_range == 2
    else:
        decay = tl.load(p_decay).to(tl.float64)
        weight = tl.where((decay >= 0) & (decay <= 1), 1 - decay, float("nan"))
        keeps = weight == 0
        copies = weight == 1
        share = weight.to(tl.float32)
    from_old = share < 0.5
    blend = (keeps, copies, from_old, tl.where(from_old, share, share - 1))
    seed = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
    step = step_low.to(tl.uint32)
    if p_step is not None:
        step = tl.load(p_step).to(tl.uint32)

    addresses = (momentum, policy, compensation, publish)
    is_aligned = ((momentum | policy | compensation | publish) & 15) == 0
    whole = tl.where(is_aligned, begin + (end - begin) // BLOCK * BLOCK, begin)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            for at in range(begin, whole, BLOCK):
                _update(addresses, at, end, i_tensor, blend, seed, step, offset, KINDS[i], STOCHASTIC, True, BLOCK)
            for at in range(whole, end, BLOCK // 4):
                _update(
                    addresses, at, end, i_tensor, blend, seed, step, offset, KINDS[i], STOCHASTIC, False, BLOCK // 4
                )


class _Table(NamedTuple):
    """Descriptors of a call's tensors."""

    # int64 [7 or 8, N] on the host: four addresses (0 for none), elements, first span, index into kinds, offsets if any
    rows: Tensor
    kinds: tuple[tuple[Any, ...], ...]  # dtypes of momentum, policy, compensation and publish; int8 for none
    span: int  # elements of a program
    num_spans: int


_tables: OrderedDict[tuple[Any, ...], _Table] = OrderedDict()
# Host memory that a graph's copies read at every replay.
_captured: list[Tensor] = []


def _spread(values: Sequence[Any], indices: Sequence[int], length: int, absent: Any) -> list[Any]:
    """The values at their indices."""
    column = [absent] * length
    for index, value in zip(indices, values, strict=True):
        column[index] = value
    return column


def _build(
    addresses: list[list[int]],
    counts: list[int],
    kinds: list[tuple[Any, ...]],
    offsets: Sequence[int],
    pinned: bool,
) -> _Table:
    """Cut the tensors into spans and write the table."""
    distinct = tuple(sorted(set(kinds), key=str))
    num_blocks = sum(-(-count // _BLOCK) for count in counts)
    span = _BLOCK * max(1, min(_MOST_BLOCKS, num_blocks // _ENOUGH_PROGRAMS))
    first_spans, num_spans = [], 0
    for count in counts:
        first_spans.append(num_spans)
        num_spans += -(-count // span)
    columns = [*addresses, counts, first_spans, [distinct.index(kind) for kind in kinds]]
    rows = torch.tensor([*columns, list(offsets)] if offsets else columns)
    return _Table(rows.pin_memory() if pinned else rows, distinct, span, num_spans)


def _find_table(
    lists: Sequence[Sequence[Tensor]], compensated: Sequence[int], published: Sequence[int], offsets: Sequence[int]
) -> _Table:
    """The table of momentum, policy, compensation and publish."""
    momentum = lists[0]
    num, on_device = len(momentum), momentum[0].is_cuda
    indices = (range(num), range(num), compensated, published)
    addresses, dtypes = (
        [_spread(list(map(of, tensors)), at, num, absent) for tensors, at in zip(lists, indices, strict=True)]
        for of, absent in ((Tensor.data_ptr, 0), (lambda tensor: _DTYPES[tensor.dtype], tl.int8))
    )
    counts = list(map(Tensor.numel, momentum))
    kinds = list(zip(*dtypes, strict=True))
    key = (on_device, *map(tuple, addresses), tuple(counts), tuple(kinds), tuple(offsets))
    table = _tables.pop(key, None) or _build(addresses, counts, kinds, offsets, on_device)
    _tables[key] = table
    if len(_tables) > _MOST_TABLES:
        _tables.popitem(last=False)
    if on_device and torch.cuda.is_current_stream_capturing():
        _captured.append(table.rows)
    return table


def _signed(word: int) -> int:
    """The int32 of the low 32 bits, so that an argument is of one type whatever its value."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def ema_update_(
    momentum: Sequence[Tensor],
    policy: Sequence[Tensor],
    compensation: Sequence[Tensor],
    compensated: Sequence[int],
    publish: Sequence[Tensor],
    published: Sequence[int],
    decay: float,
    decay_tensor: Tensor | None,
    stochastic: bool,
    seed: int,
    step: int,
    step_tensor: Tensor | None,
    offsets: Sequence[int],
) -> None:
    """See ops.py."""
    table = _find_table((momentum, policy, compensation, publish), compensated, published, offsets)
    device = momentum[0].device
    if table.num_spans:
        # The share of the policy, taken in fp64; an invalid one makes the momentum NaN.
        weight = 1.0 - decay if 0.0 <= decay <= 1.0 else float("nan")
        ema_update_kernel[(table.num_spans,)](
            table.rows.to(device, non_blocking=True),
            len(momentum),
            table.span,
            weight,
            _KEEPS if weight == 0 else _COPIES if weight == 1 else 0,
            _on(device, decay_tensor),
            _signed(seed),
            _signed(seed >> 32),
            _signed(step),
            _on(device, step_tensor),
            table.kinds,
            stochastic,
            bool(offsets),
            _BLOCK,
            num_warps=_NUM_WARPS,
        )
    torch.autograd.graph.increment_version([*momentum, *compensation, *publish])


def _on(device: torch.device, scalar: Tensor | None) -> Tensor | None:
    """A 0-d tensor on the device; copies it if it was made on the host."""
    return None if scalar is None else scalar.to(device, non_blocking=True)


def variants() -> list[Variant]:
    """See Variant."""
    f, b, h, none = *_DTYPES.values(), tl.int8
    modes: list[tuple[tuple[tuple[Any, ...], ...], bool, bool]] = [
        (((f, f, none, none),), False, False),
        (((f, f, none, b),), False, False),
        (((f, b, none, none),), False, False),
        (((f, b, none, b),), False, False),
        (((b, b, none, none),), False, False),
        (((b, b, none, none),), True, False),
        (((b, b, none, b),), True, False),
        (((b, b, none, none),), True, True),
        (((b, b, none, b),), True, True),
        (((b, f, b, none),), False, False),
        (((h, h, none, none),), False, False),
        (((b, f, none, b), (f, f, none, b)), True, False),
        (((b, f, none, b), (f, f, none, b)), True, True),
    ]
    scalars = ("num_tensors", "span", "end_of_range", "seed_low", "seed_high", "step_low")
    absent: dict[str, str | None] = {"p_table": "*i64", "share": "fp32", "p_decay": None, "p_step": None}
    absent |= dict.fromkeys(scalars, "i32")
    given = absent | {"p_decay": "*fp32", "p_step": "*i64"}
    found = []
    for types, kinds, stochastic, offsets in [(given, *modes[0]), *((absent, *mode) for mode in modes)]:
        constants = {"KINDS": kinds, "STOCHASTIC": stochastic, "OFFSETS": offsets, "BLOCK": _BLOCK}
        momentum, policy, compensation, publish = (
            sum(kind.primitive_bitwidth // 8 for kind in kinds if kind != none) for kinds in zip(*kinds, strict=True)
        )
        each = _BLOCK // (32 * _NUM_WARPS)
        reads, writes = each * (momentum + policy + compensation), each * (momentum + compensation + publish)
        found.append(variant(ema_update_kernel, types, constants, _NUM_WARPS, reads=reads, writes=writes))
    return found
