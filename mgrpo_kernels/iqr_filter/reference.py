"""Interquartile filter on trajectory entropy: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo_kernels.results import IqrFilter

_FEWEST = 4
_LEAST_IQR = 1e-6


def _quartile(ordered: Tensor, count: Tensor, fraction: float) -> Tensor:
    """Linear quantile of the first `count` entries of each sorted row, rounded exactly as torch.quantile rounds."""
    rank = (count - 1).clamp_min(0).to(ordered.dtype) * fraction
    below = ordered.gather(1, rank.floor().long())
    above = ordered.gather(1, rank.ceil().long())
    return below.lerp(above, rank - rank.floor())


def iqr_filter(entropy: Tensor, *, k: float, scope: str, keep: Tensor | None, two_sided: bool) -> IqrFilter:
    """See the public function."""
    if keep is None:
        keep = torch.ones_like(entropy, dtype=torch.bool)
    rows = entropy.reshape(1, -1) if scope == "batch" else entropy
    used = keep.reshape(rows.shape)
    count = used.sum(1, keepdim=True)
    # One more infinity at the end gives rank 0 of an empty row something to read.
    ordered = torch.nn.functional.pad(rows.masked_fill(~used, torch.inf).sort(dim=1).values, (0, 1), value=torch.inf)
    undefined = (count == 0) | (used & ~rows.isfinite()).any(1, keepdim=True)
    q1 = _quartile(ordered, count, 0.25).masked_fill(undefined, torch.nan)
    q3 = _quartile(ordered, count, 0.75).masked_fill(undefined, torch.nan)
    iqr = q3 - q1
    outside = rows < q1 - k * iqr
    if two_sided:
        outside = outside | (rows > q3 + k * iqr)
    outside = outside & (count >= _FEWEST) & (iqr >= _LEAST_IQR)
    quartiles = (q1.reshape(()), q3.reshape(())) if scope == "batch" else (q1.squeeze(1), q3.squeeze(1))
    return IqrFilter((used & ~outside).reshape(keep.shape), *quartiles)
