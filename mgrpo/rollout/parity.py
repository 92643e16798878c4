"""Compares an engine's log-probs of its own tokens with the trainer's: whether it wrote with the weights asked for,
and whether the model that it decodes is the model that is trained.
"""

from __future__ import annotations

import math

import torch

from mgrpo.errors import ParityError, StaleWeightsError
from mgrpo.types import Source

# Mean difference a token, nats, that two right computations of one model may have. Products of bf16 are rounded to 8
# bits layer after layer, in another order by each engine: 0.01 to 0.03 is usual; other weights give 0.3 and more, a
# missing head 1.7. In fp32 1e-6 is usual, and one optimiser step already gives more than the bound.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def check_parity(
    engine: torch.Tensor, trainer: torch.Tensor, mask: torch.Tensor, *, dtype: torch.dtype, source: Source, version: int
) -> float:
    """Mean difference of log-probs [R, L] where mask [R, L] holds, nats; StaleWeightsError above the dtype's bound."""
    gap = _mean((engine - trainer).abs()[mask])
    if not gap <= BOUNDS[dtype]:
        raise StaleWeightsError(
            f"{_disagreement(gap, dtype)} It did not write with the weights of {source} version {version}."
        )
    return gap


def check_embedded(
    engine: torch.Tensor,
    trainer: torch.Tensor,
    mask: torch.Tensor,
    *,
    dtype: torch.dtype,
    source: Source,
    version: int,
    top_p: float = 1.0,
) -> float:
    """The same of the embedded engine, which shares the trainer's weights; ParityError above the dtype's bound.

    Nucleus sampling adds to a log-prob between 0 and -log(top_p); what lies within counts as no difference. Log-probs
    that are not finite say nothing of the engine, and are left to the checks of the step.
    """
    excess = engine - trainer
    excess = excess - excess.clamp(0.0, -math.log(top_p))
    gap = _mean(excess.abs()[mask & excess.isfinite()])
    if not gap <= BOUNDS[dtype]:
        raise ParityError(
            f"{_disagreement(gap, dtype)} The forward pass that this model decodes with is not its plain forward pass, "
            f"under the weights of {source} version {version}. Take --rollout.engine vllm."
        )
    return gap


def _mean(difference: torch.Tensor) -> float:
    return float(difference.mean()) if len(difference) else 0.0


def _disagreement(gap: float, dtype: torch.dtype) -> str:
    """What both errors begin with."""
    return (
        f"rollout: the engine's log-probs must agree with the trainer's to {BOUNDS[dtype]:g} nats a token in "
        f"{str(dtype).removeprefix('torch.')}, they differ by {gap:.3g}."
    )
