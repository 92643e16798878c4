"""Compares an engine's log-probs of its own tokens with the trainer's: whether it wrote with the weights asked for,
and whether the model that it decodes is the model that is trained.
"""

from __future__ import annotations

import math

import torch

from mgrpo.errors import ParityError, StaleWeightsError
from mgrpo.types import WeightTag

# Mean difference a token, nats, that two right computations of one model may have. Products of bf16 are rounded to 8
# bits layer after layer, in another order by each engine: 0.01 to 0.03 is usual; other weights give 0.3 and more, a
# missing head 1.7. In fp32 1e-6 is usual, and one optimiser step already gives more than the bound.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def check_parity(
    engine: torch.Tensor,
    trainer: torch.Tensor,
    mask: torch.Tensor,
    *,
    dtype: torch.dtype,
    tag: WeightTag,
    shared: bool = False,
    top_p: float = 1.0,
) -> float:
    """Mean difference a token of an engine's log-probs and the trainer's, in nats.

    Args:
        engine, trainer: [R, L] fp32 log-probs.
        mask: [R, L] bool, tokens that are compared.
        dtype: of the forward passes, which sets the bound.
        tag: of the weights.
        shared: whether the engine generates with the trainer's own weights. Then log-probs that are not finite say
            nothing of the engine, and are left to the checks of the step; and nucleus sampling adds to a log-prob
            between 0 and -log(top_p): what lies within counts as no difference.
        top_p: of the sampling.

    Raises:
        ParityError: above the bound, of shared weights: the engine computes another model.
        StaleWeightsError: above the bound: the engine holds other weights.
    """
    excess = engine - trainer
    if shared:
        excess = excess - excess.clamp(0.0, -math.log(top_p))
        mask = mask & excess.isfinite()
    difference = excess.abs()[mask]
    gap = float(difference.mean()) if len(difference) else 0.0
    if gap <= BOUNDS[dtype]:
        return gap
    disagreement = (
        f"rollout: the engine's log-probs must agree with the trainer's to {BOUNDS[dtype]:g} nats a token in "
        f"{str(dtype).removeprefix('torch.')}, they differ by {gap:.3g}."
    )
    if shared:
        raise ParityError(
            f"{disagreement} The forward pass that this model decodes with is not its plain forward pass, under the "
            f"weights of {tag.source} version {tag.version}. Take --engine.name vllm."
        )
    raise StaleWeightsError(f"{disagreement} It did not write with the weights of {tag.source} version {tag.version}.")
