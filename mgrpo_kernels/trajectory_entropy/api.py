"""Public function: entropy of whole trajectories."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels._common.checks import FLOATS, check_choice, check_cu_seqlens, check_tensor, invalid
from mgrpo_kernels.backends import implementations, resolve
from mgrpo_kernels.trajectory_entropy import autograd, reference

_IMPLEMENTATIONS = implementations(reference.trajectory_entropy, autograd.trajectory_entropy)


def trajectory_entropy(
    token_entropy: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    reduce: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """H_n = (1 / |n|) sum of the token entropies of sequence n, or the plain sum.

    Args:
        token_entropy: float, nats: [T] packed with cu_seqlens, or [N, L] padded with mask.
        cu_seqlens: [N+1] int32 or int64, boundaries of the packed sequences, from 0 to T.
        mask: [N, L] bool, True for the tokens that count; the others may hold anything.
        reduce: "mean" | "sum".
        backend: "auto" or a name from `backends()`.

    Returns:
        [N] fp32 (fp64 for fp64), nats, differentiable; 0 for a trajectory without tokens.

    Raises:
        ValueError: a shape, dtype, device or option is wrong, or not exactly one of cu_seqlens and mask is given; on a
            CPU, or with MGRPO_CHECK=1, also boundaries that do not cover the tokens.

    Numerics: summed in fp32 or better, in a fixed order.

    Cost: one read of token_entropy.

    Source: the M-GRPO paper's trajectory-level entropy.
    """
    where = "trajectory_entropy"
    if (cu_seqlens is None) == (mask is None):
        given = "neither" if mask is None else "both"
        raise invalid(where, "cu_seqlens or mask", "given, and one alone", given, "Packed tokens have no mask.")
    check_choice(where, "reduce", reduce, ("mean", "sum"))
    if cu_seqlens is not None:
        check_tensor(where, "token_entropy", token_entropy, "[T]", (None,), FLOATS)
        check_cu_seqlens(where, cu_seqlens, token_entropy.shape[0], token_entropy.device)
    else:
        check_tensor(where, "token_entropy", token_entropy, "[N, L]", (None, None), FLOATS)
        check_tensor(where, "mask", mask, "[N, L]", tuple(token_entropy.shape), (torch.bool,), token_entropy.device)
    implementation = _IMPLEMENTATIONS[
        resolve(where, token_entropy.device, backend, (token_entropy.dtype,), _IMPLEMENTATIONS)
    ]
    return implementation(token_entropy, cu_seqlens=cu_seqlens, mask=mask, reduce=reduce)
