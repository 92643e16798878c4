"""Triton kernel: majority vote over the answers of each prompt, one launch.

Fused: grouping, counting, tie rule, shares and margin, in one read of the arguments. A program compares every pair of
a prompt's answers, a tile of all G against a few at a time. B prompts, G rollouts a prompt.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgrpo_kernels._common.checks import checks_values, invalid
from mgrpo_kernels._common.native import contiguous
from mgrpo_kernels._common.triton import Variant, variant

# G^2 pairs a program: 16 M of them at 4096, some 1 ms on a multiprocessor; the reference takes their memory.
_MOST_GROUP = 4096
# Pairs of a tile for a thread: two sums of int64 each, within its registers.
_THREAD_PAIRS = 8


@triton.jit
def _votes(p_keep, p_weights, o, m, WEIGHTED: tl.constexpr):
    """Votes of the rollouts at `o`: int64 where weighted, else int32."""
    if p_keep is not None:
        m = m & (tl.load(p_keep + o, mask=m, other=0) != 0)
    if WEIGHTED:
        return tl.maximum(tl.load(p_weights + o, mask=m, other=0).to(tl.int64), 0)
    else:
        return m.to(tl.int32)


@triton.jit
def _least(p_values, size, BLOCK: tl.constexpr):
    """The least of the values and 0."""
    o = tl.arange(0, BLOCK)
    b_least = tl.zeros([BLOCK], tl.int64)
    for start in range(0, size, BLOCK):
        b_least = tl.minimum(b_least, tl.load(p_values + start + o, mask=o < size - start, other=0).to(tl.int64))
    return tl.min(b_least, 0)


@triton.jit(do_not_specialize=["num_prompts", "group"])
def majority_vote_kernel(
    p_ids,  # [B, G]; negative for no answer
    p_keep,  # [B, G] or None
    p_weights,  # [B, G] or None
    p_tie_break,  # [B, G] or None
    p_label,  # [B]
    p_share,  # [B]
    p_margin,  # [B]
    p_tie,  # [B]
    p_class_share,  # [B, G]
    p_lowest,  # [2]
    num_prompts,
    group,
    LOWEST: tl.constexpr,
    BG: tl.constexpr,
    BO: tl.constexpr,
):
    """One prompt a program; the program after the last finds the least id and weight of all, 0 without LOWEST."""
    WEIGHTED: tl.constexpr = p_weights is not None
    i_prompt = tl.program_id(0).to(tl.int64)
    if i_prompt == num_prompts:
        least_id = i_prompt * 0
        least_weight = i_prompt * 0
        if LOWEST:
            least_id = _least(p_ids, i_prompt * group, BG)
            if WEIGHTED:
                least_weight = _least(p_weights, i_prompt * group, BG)
        tl.store(p_lowest, least_id)
        tl.store(p_lowest + 1, least_weight)
    else:
        start = i_prompt * group
        o = tl.arange(0, BG)
        m = o < group
        b_id = tl.load(p_ids + start + o, mask=m, other=-1)
        b_votes = _votes(p_keep, p_weights, start + o, m, WEIGHTED)
        b_class = tl.zeros_like(b_votes)
        b_preferred = tl.zeros_like(b_votes)
        for first in range(0, group, BO):
            o_other = start + first + tl.arange(0, BO)
            m_other = first + tl.arange(0, BO) < group
            b_other = tl.load(p_ids + o_other, mask=m_other, other=-1)
            b_other_votes = _votes(p_keep, p_weights, o_other, m_other, WEIGHTED)
            is_same = b_id[:, None] == b_other[None, :]
            b_class += tl.sum(tl.where(is_same, b_other_votes[None, :], 0), 1)
            if p_tie_break is not None:
                prefers = tl.load(p_tie_break + o_other, mask=m_other, other=0) != 0
                b_preferred += tl.sum(tl.where(is_same & prefers[None, :], b_other_votes[None, :], 0), 1)

        is_voter = (b_id >= 0) & (b_votes > 0)
        top = tl.max(tl.where(is_voter, b_class, 0), 0)
        is_leader = is_voter & (b_class == top)
        top_preferred = tl.max(tl.where(is_leader, b_preferred, -1), 0)
        # The earliest of the remaining ones.
        winner = tl.min(tl.where(is_leader & (b_preferred == top_preferred), o, BG), 0)
        label = tl.max(tl.where(o == winner, b_id, -1), 0)
        is_rival = is_voter & (b_id != label)
        second = tl.max(tl.where(is_rival, b_class, 0), 0)
        total = tl.maximum(tl.sum(b_votes, 0), 1).to(tl.float32)
        tl.store(p_label + i_prompt, label)
        tl.store(p_share + i_prompt, tl.div_rn(top.to(tl.float32), total))
        tl.store(p_margin + i_prompt, tl.div_rn((top - second).to(tl.float32), total))
        tl.store(p_tie + i_prompt, (top > 0) & (top == second))
        b_own = tl.where(b_id >= 0, b_class, 0).to(tl.float32)
        tl.store(p_class_share + start + o, tl.div_rn(b_own, tl.zeros_like(b_own) + total), mask=m)


def _sizes(group: int) -> tuple[int, int, int]:
    """Padded group, rollouts compared with it at a time, warps."""
    padded = triton.next_power_of_2(group)
    num_warps = 1 if padded <= 64 else 4 if padded <= 512 else 8
    return padded, min(padded, max(1, 32 * num_warps * _THREAD_PAIRS // padded)), num_warps


def majority_vote(
    answer_ids: Tensor, keep: Tensor | None, weights: Tensor | None, tie_break: Tensor | None
) -> tuple[Tensor, ...]:
    """See ops.py. The least id and weight are computed only if the public function checks them, else 0."""
    num_prompts, group = answer_ids.shape
    if group > _MOST_GROUP:
        expected = f"of at most {_MOST_GROUP} rollouts a prompt for backend 'triton'"
        raise invalid("majority_vote", "answer_ids", expected, group, 'Pass backend="reference".')
    outputs = (
        answer_ids.new_empty(num_prompts, dtype=torch.int64),
        answer_ids.new_empty(num_prompts, dtype=torch.float32),
        answer_ids.new_empty(num_prompts, dtype=torch.float32),
        answer_ids.new_empty(num_prompts, dtype=torch.bool),
        answer_ids.new_empty(answer_ids.shape, dtype=torch.float32),
        answer_ids.new_empty(2, dtype=torch.int64),
    )
    block_group, block_others, num_warps = _sizes(group)
    majority_vote_kernel[(num_prompts + 1,)](
        answer_ids.contiguous(),
        contiguous(keep),
        contiguous(weights),
        contiguous(tie_break),
        *outputs,
        num_prompts,
        group,
        checks_values(answer_ids.device),
        block_group,
        block_others,
        num_warps=num_warps,
    )
    return outputs


def variants() -> list[Variant]:
    """The kernel as the launcher starts it."""
    found = []
    for group, weights, lowest in ((32, None, False), (32, "*i32", False), (64, "*i64", True), (4096, "*i64", True)):
        block_group, block_others, num_warps = _sizes(group)
        types = {"p_ids": "*i64", "p_keep": "*i1", "p_weights": weights, "p_tie_break": "*i1"}
        types |= {"p_label": "*i64", "p_share": "*fp32", "p_margin": "*fp32", "p_tie": "*i1"}
        types |= {"p_class_share": "*fp32", "p_lowest": "*i64", "num_prompts": "i32", "group": "i32"}
        constants = {"LOWEST": lowest, "BG": block_group, "BO": block_others}
        found.append(variant(majority_vote_kernel, types, constants, num_warps))
    return found
