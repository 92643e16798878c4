"""Checks weights and gathers those that are sharded, for an engine that has a copy of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from mgrpo.distributed.exchange import WeightStream
from mgrpo.distributed.sharding import local
from mgrpo.distributed.world import World
from mgrpo.errors import EngineError
from mgrpo.rollout.engine import Shapes, check_weights


@contextmanager
def sending(
    weights: Mapping[str, torch.Tensor], shapes: Shapes, world: World, dtype: torch.dtype
) -> Iterator[WeightStream]:
    """The stream of weights to send within the block, which every rank enters.

    Raises:
        EngineError: a tensor is missing, has another shape, or is not finite; PeerError where that is so, or the block
            fails, on another rank.
    """
    with WeightStream(weights, world, dtype=dtype) as stream:
        check_weights(weights, shapes)
        # Their non-finite keys and values would stay in vLLM's KV cache and spoil later rollouts.
        if infinite := _not_finite(weights):
            raise EngineError(f"update_weights: weights must be finite, {infinite} is not.")
        yield stream


@torch.no_grad()
def _not_finite(weights: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the first tensor with an infinity or NaN, of sharded ones here; waits for a device once."""
    names, largest = [], []
    for name, tensor in weights.items():
        own = local(tensor)
        if own.is_floating_point() and own.numel():
            names.append(name)
            largest.append(torch.linalg.vector_norm(own, torch.inf).float())
    finite = torch.stack([norm.to(largest[0].device) for norm in largest]).isfinite().tolist() if largest else []
    return next((name for name, is_finite in zip(names, finite, strict=True) if not is_finite), None)
