"""Writes weights into a vLLM engine of this process, by the method that this vLLM offers, whatever its version."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mgrpo.errors import EngineError

Weights = Iterable[tuple[str, torch.Tensor]]


WeightWriter = Callable[[Weights, str], None]
"""Copies every tensor into the engine's own storage and names the version."""


def make_writer(llm: Any) -> WeightWriter:
    """The writer for the methods that this vLLM has; raises EngineError if it has none."""

    def reload(weights: Weights, version: str) -> None:  # layer by layer in place, in the layout of each kernel
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if hasattr(llm, "update_weight_version"):
            llm.update_weight_version(version)

    executor = getattr(getattr(llm, "llm_engine", None), "model_executor", None)
    worker = getattr(executor, "driver_worker", None)
    worker = getattr(worker, "worker", worker)
    runner = getattr(worker, "model_runner", None)
    # A worker passes its arguments on to its runner, whose signature lists them.
    reload_weights = getattr(runner, "reload_weights", None)
    reads_memory = reload_weights is not None and "weights_iterator" in inspect.signature(reload_weights).parameters
    if hasattr(worker, "reload_weights") and reads_memory:
        return reload
    # Versions whose workers cannot reload from memory.
    if (load_weights := getattr(getattr(runner, "model", None), "load_weights", None)) is not None:
        return lambda weights, version: load_weights(iter(weights))
    raise EngineError("rollout: vLLM must offer reload_weights or load_weights in this process, it offers neither.")
