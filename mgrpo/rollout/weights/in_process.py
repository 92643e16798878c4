"""Writes weights into a vLLM engine of this process, by the method that this vLLM offers, whatever its version."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from mgrpo.errors import EngineError

Weights = Sequence[tuple[str, torch.Tensor]]


class WeightWriter(Protocol):
    """Replaces the weights of an engine in this process."""

    def write(self, weights: Weights, version: str) -> None:
        """Copies every tensor into the engine's own storage and names the version."""
        ...


class ReloadWriter:
    """By `reload_weights` of the worker: layer by layer in place, in the layout of each kernel."""

    def __init__(self, llm: Any):
        self._llm = llm

    def write(self, weights: Weights, version: str) -> None:
        """See WeightWriter."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if hasattr(self._llm, "update_weight_version"):
            self._llm.update_weight_version(version)


class LoadWriter:
    """By `load_weights` of the model itself, for versions whose workers cannot reload from memory."""

    def __init__(self, model: Any):
        self._model = model

    def write(self, weights: Weights, version: str) -> None:
        """See WeightWriter."""
        self._model.load_weights(iter(weights))


def make_writer(llm: Any) -> WeightWriter:
    """The writer for the methods that this vLLM has; raises EngineError if it has none."""
    executor = getattr(getattr(llm, "llm_engine", None), "model_executor", None)
    worker = getattr(executor, "driver_worker", None)
    worker = getattr(worker, "worker", worker)
    runner = getattr(worker, "model_runner", None)
    # A worker passes its arguments on to its runner, whose signature lists them.
    reload_weights = getattr(runner, "reload_weights", None)
    reads_memory = reload_weights is not None and "weights_iterator" in inspect.signature(reload_weights).parameters
    if hasattr(worker, "reload_weights") and reads_memory:
        return ReloadWriter(llm)
    model = getattr(runner, "model", None)
    if hasattr(model, "load_weights"):
        return LoadWriter(model)
    raise EngineError("rollout: vLLM must offer reload_weights or load_weights in this process, it offers neither.")
