"""Compares an engine's log-probs of its own tokens with the trainer's, to find stale weights and wrong decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mgrpo.config import KernelsConfig
from mgrpo.errors import ParityError, StaleWeightsError
from mgrpo.models.forward import Forward
from mgrpo.models.load import LoadedModel
from mgrpo.rollout.engine import Engine
from mgrpo.types import Rollouts, Sampling, WeightTag, join

# Largest mean difference a token, in nats, between two correct computations of one model. Products of bf16 are rounded
# to 8 bits layer after layer, in another order by each engine: 0.01 to 0.03 is usual; other weights give 0.3 and more,
# a missing head 1.7. In fp32 1e-6 is usual, and one optimiser step already exceeds the bound.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# Samples that `check_samples` compares, and the padded tokens of one forward pass.
NUM_ROWS, MICRO_BATCH_TOKENS = 8, 4096


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
    """Mean difference a token between an engine's log-probs and the trainer's, in nats.

    Args:
        engine, trainer: [R, L] fp32 log-probs.
        mask: [R, L] bool, tokens that are compared.
        dtype: of the forward passes, which sets the bound.
        tag: of the weights.
        shared: whether the engine generates with the trainer's own weights. Then non-finite log-probs are left to the
            step's own check, and a difference of 0 to -log(top_p), which nucleus sampling adds, counts as 0.
        top_p: of the sampling.

    Raises:
        ParityError: above the bound with shared weights: the engine decodes wrongly.
        StaleWeightsError: above the bound otherwise: the engine holds other weights.
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
    raise StaleWeightsError(f"{disagreement} It did not use the weights of {tag.source} version {tag.version}.")


def check_samples(
    engine: Engine, loaded: LoadedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, rollouts: Rollouts
) -> None:
    """Raises ParityError if the embedded engine's log-probs differ from the model's, outside of training."""
    if not (engine.weights_are_shared and engine.has_model_logprobs):
        return
    rows = torch.arange(min(NUM_ROWS, len(rollouts.lengths)))
    kernels, budget = KernelsConfig(), MICRO_BATCH_TOKENS
    forward = Forward(loaded, temperature=sampling.temperature, kernels=kernels, micro_batch_tokens=budget)
    expected = forward.run(loaded.model, join(prompts, rollouts, None), rows=rows).logprob
    check_parity(
        rollouts.logprobs[rows],
        expected[rows],
        rollouts.mask[rows],
        dtype=loaded.dtype,
        tag=rollouts.tag,
        shared=True,
        top_p=sampling.top_p,
    )
