"""Compares an engine's log-probs of its own tokens with the trainer's: whether it wrote with the weights asked for."""

from __future__ import annotations

import torch

from mgrpo.rollout.engine import Source, StaleWeightsError

# Mean difference a token, nats, that two right computations of one model may have. Products of bf16 are rounded to 8
# bits layer after layer, in another order by each engine: 0.01 to 0.03 is usual; other weights give 0.3 and more, a
# missing head 1.7. In fp32 1e-6 is usual, and one optimiser step already gives more than the bound.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def check_parity(
    engine: torch.Tensor, trainer: torch.Tensor, mask: torch.Tensor, *, dtype: torch.dtype, source: Source, version: int
) -> float:
    """Mean difference of log-probs [R, L] where mask [R, L] holds, nats; StaleWeightsError above the dtype's bound."""
    difference = (engine - trainer).abs()[mask]
    gap = float(difference.mean()) if len(difference) else 0.0
    if not gap <= BOUNDS[dtype]:
        raise StaleWeightsError(
            f"rollout: the engine's log-probs must agree with the trainer's to {BOUNDS[dtype]:g} nats a token in "
            f"{str(dtype).removeprefix('torch.')}, they differ by {gap:.3g}. It did not write with the weights of "
            f"{source} version {version}."
        )
    return gap
