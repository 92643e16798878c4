"""Public function: advantage within a group of rollouts."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels import ops  # noqa: F401  (defines torch.ops.mgrpo_kernels)
from mgrpo_kernels._common.checks import FLOATS, check_choice, check_tensor, invalid
from mgrpo_kernels.backends import implementations, resolve
from mgrpo_kernels.group_advantage import reference


def _compiled(rewards: Tensor, *, keep: Tensor | None, mode: str, backend: str) -> Tensor:
    """Any compiled backend."""
    return torch.ops.mgrpo_kernels.group_advantage(rewards, keep, mode, backend)


_IMPLEMENTATIONS = implementations(reference.group_advantage, _compiled)


def group_advantage(rewards: Tensor, *, keep: Tensor | None = None, mode: str = "std", backend: str = "auto") -> Tensor:
    """A_i = (r_i - mean) / (std + 1e-6) over the kept rollouts of a group, or another baseline.

    Args:
        rewards: [B, G] float, G >= 1.
        keep: [B, G] bool, the rollouts that take part; the others may hold anything. Default: all.
        mode: "std" (n - 1 in the variance) | "mean" (no division) | "leave_one_out" (r_i minus the mean of the
            others) | "sign" (2 r_i - 1).
        backend: "auto" or a name from `backends()`.

    Returns:
        [B, G] fp32 (fp64 for fp64), without a gradient. A rollout that is not kept gives 0; so does, in every mode, a
        whole group with fewer than two kept rollouts or with equal kept rewards. A NaN among the kept rewards makes its
        group NaN ("sign": its own entry alone).

    Raises:
        ValueError: a shape, dtype, device or option is wrong.

    Numerics: fp32; the variance takes two passes, so that a large mean does not cancel it.

    Cost: one read of rewards, one write.

    Source: DeepSeekMath (arXiv 2402.03300), Dr. GRPO (2503.20783) for "mean", RLOO (2402.14740) for "leave_one_out".
    """
    where = "group_advantage"
    check_tensor(where, "rewards", rewards, "[B, G]", (None, None), FLOATS)
    if rewards.shape[1] == 0:
        raise invalid(where, "rewards", "of shape [B, G] with G >= 1", list(rewards.shape), "Pass rollouts.")
    if keep is not None:
        check_tensor(where, "keep", keep, "[B, G]", tuple(rewards.shape), (torch.bool,), rewards.device)
    check_choice(where, "mode", mode, ("std", "mean", "leave_one_out", "sign"))
    implementation = _IMPLEMENTATIONS[resolve(where, rewards.device, backend, (rewards.dtype,), _IMPLEMENTATIONS)]
    return implementation(rewards.detach(), keep=keep, mode=mode)
