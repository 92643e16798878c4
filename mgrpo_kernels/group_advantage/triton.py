"""Triton kernel: advantage of each rollout within its group, one launch.

Fused: selection, mean, deviation in a second pass, and normalisation; a group's rewards stay in registers, read once
and written once. B prompts, G rollouts a prompt.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgrpo_kernels._common.checks import invalid
from mgrpo_kernels._common.native import contiguous
from mgrpo_kernels._common.triton import Variant, variant

_EPS = tl.constexpr(1e-6)
# A group is one tile of a program: 32 numbers a thread at 8 warps; 64 spill.
_MOST_GROUP = 8192
# Numbers of a program, in whole groups: 4 a thread of 4 warps, and programs enough to fill a GPU at 512 x 16.
_PROGRAM_ENTRIES = 512


@triton.jit(do_not_specialize=["num_prompts", "group"])
def group_advantage_kernel(
    p_rewards,  # [B, G]
    p_keep,  # [B, G] or None
    p_advantage,  # [B, G]
    num_prompts,
    group,
    MODE: tl.constexpr,
    BB: tl.constexpr,
    BG: tl.constexpr,
):
    """BB groups."""
    o_prompt = tl.program_id(0) * BB + tl.arange(0, BB)[:, None]
    o_rollout = tl.arange(0, BG)[None, :]
    o = o_prompt.to(tl.int64) * group + o_rollout
    m = (o_prompt < num_prompts) & (o_rollout < group)
    m_kept = m
    if p_keep is not None:
        m_kept = m & (tl.load(p_keep + o, mask=m, other=0) != 0)
    b_reward = tl.load(p_rewards + o, mask=m_kept, other=0.0).to(tl.float32)
    count = tl.sum(m_kept.to(tl.int32), 1)[:, None]
    # A NaN differs from everything, but minimum and maximum ignore it.
    least = tl.min(tl.where(m_kept, b_reward, float("inf")), 1)[:, None]
    greatest = tl.max(tl.where(m_kept, b_reward, float("-inf")), 1)[:, None]
    num_nan = tl.sum((b_reward != b_reward).to(tl.int32), 1)[:, None]
    has_signal = (count > 1) & ((least != greatest) | (num_nan > 0))

    kept = tl.maximum(count, 1).to(tl.float32)
    others = tl.maximum(count - 1, 1).to(tl.float32)
    mean = tl.div_rn(tl.sum(b_reward, 1)[:, None], kept)
    b_centred = tl.where(m_kept, b_reward - mean, 0.0)
    if MODE == "std":
        variance = tl.div_rn(tl.sum(b_centred * b_centred, 1)[:, None], others)
        b_advantage = tl.div_rn(b_centred, tl.zeros_like(b_centred) + (tl.sqrt_rn(variance) + _EPS))
    elif MODE == "mean":
        b_advantage = b_centred
    elif MODE == "leave_one_out":
        b_advantage = tl.div_rn(b_centred * kept, tl.zeros_like(b_centred) + others)
    else:
        b_advantage = 2 * b_reward - 1
    tl.store(p_advantage + o, tl.where(m_kept & has_signal, b_advantage, 0.0), mask=m)


def _sizes(group: int) -> tuple[int, int, int]:
    """Groups of a program, padded group, warps."""
    padded = triton.next_power_of_2(group)
    return max(1, _PROGRAM_ENTRIES // padded), padded, 4 if padded <= 2048 else 8


def group_advantage(rewards: Tensor, keep: Tensor | None, mode: str) -> Tensor:
    """See ops.py."""
    num_prompts, group = rewards.shape
    if group > _MOST_GROUP:
        expected = f"of at most {_MOST_GROUP} rollouts a prompt for backend 'triton'"
        raise invalid("group_advantage", "rewards", expected, group, 'Pass backend="reference".')
    advantage = rewards.new_empty(rewards.shape, dtype=torch.float32)
    block_prompts, block_group, num_warps = _sizes(group)
    if num_prompts:
        group_advantage_kernel[(triton.cdiv(num_prompts, block_prompts),)](
            rewards.contiguous(),
            contiguous(keep),
            advantage,
            num_prompts,
            group,
            mode,
            block_prompts,
            block_group,
            num_warps=num_warps,
        )
    return advantage


def variants() -> list[Variant]:
    """The kernel as the launcher starts it."""
    found = []
    for dtype, group, mode in (
        ("*fp32", 16, "std"),
        ("*bf16", 16, "mean"),
        ("*fp16", 1024, "sign"),
        ("*fp32", 8192, "std"),
        ("*fp32", 2048, "leave_one_out"),
    ):
        block_prompts, block_group, num_warps = _sizes(group)
        pointers = {"p_rewards": dtype, "p_keep": "*i1", "p_advantage": "*fp32"}
        constants = {"MODE": mode, "BB": block_prompts, "BG": block_group}
        types = pointers | {"num_prompts": "i32", "group": "i32"}
        found.append(variant(group_advantage_kernel, types, constants, num_warps))
    return found
