"""Compares the embedded engine with the model outside of training, where no trainer has scored its samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mgrpo.config import KernelsConfig
from mgrpo.models.forward import Forward
from mgrpo.models.load import LoadedModel
from mgrpo.rollout.engine import Engine
from mgrpo.rollout.parity import check_parity
from mgrpo.types import Rollouts, Sampling, join

# Samples that are scored, and the padded tokens of one forward pass.
NUM_ROWS, MICRO_BATCH_TOKENS = 8, 4096


def check_samples(
    engine: Engine, loaded: LoadedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, rollouts: Rollouts
) -> None:
    """ParityError where the first log-probs of the embedded engine are not those of the model's plain forward pass."""
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
