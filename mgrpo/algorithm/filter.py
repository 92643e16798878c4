"""The IQR filter of trajectories by entropy."""

from __future__ import annotations

import torch

import mgrpo_kernels as K
from mgrpo.config import FilterConfig


def filter_trajectories(entropy: torch.Tensor, config: FilterConfig, *, backend: str = "auto") -> torch.Tensor:
    """Keeps trajectories of entropy H_i >= Q1 - k (Q3 - Q1).

    Args:
        entropy: [B, G] fp32, trajectory entropies in nats.
        config: factor, scope and sides; `applies_to` "none" keeps all whose entropy is finite.
        backend: backend of mgrpo_kernels.

    Returns:
        [B, G] bool, True where the trajectory is kept.
    """
    finite = entropy.isfinite()
    if config.applies_to == "none":
        return finite
    return K.iqr_filter(
        entropy.masked_fill(~finite, 0.0),
        k=config.k,
        scope=config.scope,
        keep=finite,
        two_sided=config.two_sided,
        backend=backend,
    ).keep
