"""Public function: interquartile filter on trajectory entropy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mgrpo_kernels import ops  # noqa: F401  (defines torch.ops.mgrpo_kernels)
from mgrpo_kernels._common.checks import as_flag, as_number, check_choice, check_tensor, checks_values, invalid
from mgrpo_kernels.backends import implementations, resolve
from mgrpo_kernels.iqr_filter import reference
from mgrpo_kernels.results import IqrFilter


def _compiled(
    entropy: Tensor, *, k: float, scope: str, keep: Tensor | None, two_sided: bool, backend: str
) -> IqrFilter:
    """Any compiled backend."""
    return IqrFilter(*torch.ops.mgrpo_kernels.iqr_filter(entropy, k, scope, keep, two_sided, backend))


_IMPLEMENTATIONS = implementations(reference.iqr_filter, _compiled)


def iqr_filter(
    entropy: Tensor,
    *,
    k: float = 0.75,
    scope: str = "batch",
    keep: Tensor | None = None,
    two_sided: bool = False,
    backend: str = "auto",
) -> IqrFilter:
    """Drop i where H_i < Q1 - k (Q3 - Q1).

    Args:
        entropy: [B, G] fp32 or fp64, G >= 1, one number a trajectory.
        k: >= 0, width of the fence in interquartile ranges.
        scope: "batch" takes the quartiles over all trajectories, "prompt" over the G of each prompt.
        keep: [B, G] bool, the trajectories that take part; the others stay dropped and may hold anything. Default: all.
        two_sided: also drop i where H_i > Q3 + k (Q3 - Q1).
        backend: "auto" or a name from `backends()`.

    Returns:
        IqrFilter: keep [B, G] bool; q1 and q3 in entropy's dtype, 0-d with scope "batch", [B] with "prompt", NaN where
        nothing takes part; no gradient. Nothing is dropped where fewer than 4 trajectories take part or Q3 - Q1 < 1e-6.

    Raises:
        ValueError: a shape, dtype, device or option is wrong; on a CPU, or with MGRPO_CHECK=1, also a non-finite
            entropy among those that take part. Elsewhere it makes the quartiles NaN and drops nothing.

    Numerics: quartiles with linear interpolation, bit-equal to torch.quantile in the same dtype.

    Cost: a selection, linear in the entries; the reference sorts.

    Source: the M-GRPO paper's IQR filter; Tukey's fences.
    """
    where = "iqr_filter"
    check_tensor(where, "entropy", entropy, "[B, G]", (None, None), (torch.float32, torch.float64))
    if entropy.shape[1] == 0:
        raise invalid(where, "entropy", "of shape [B, G] with G >= 1", list(entropy.shape), "Pass trajectories.")
    if keep is not None:
        check_tensor(where, "keep", keep, "[B, G]", tuple(entropy.shape), (torch.bool,), entropy.device)
    k = as_number(where, "k", k, 0.0)
    two_sided = as_flag(where, "two_sided", two_sided)
    check_choice(where, "scope", scope, ("batch", "prompt"))
    entropy = entropy.detach()
    implementation = _IMPLEMENTATIONS[resolve(where, entropy.device, backend, (entropy.dtype,), _IMPLEMENTATIONS)]
    result = implementation(entropy, k=k, scope=scope, keep=keep, two_sided=two_sided)
    # A non-finite entropy makes its quartiles NaN, and so their sum; otherwise nothing more is checked.
    if checks_values(entropy.device) and math.isnan(result.q1.sum()):
        wrong = ~entropy.isfinite() if keep is None else keep & ~entropy.isfinite()
        if wrong.any():
            remedy = "Leave such trajectories out with keep."
            raise invalid(where, "entropy", "finite", float(entropy[wrong][0]), remedy)
    return result
