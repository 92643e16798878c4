"""Sends weights to a vLLM server from GPU to GPU, by vLLM's own trainer-side engine."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Iterator
from typing import Any

import torch

from mgrpo.distributed.exchange import WeightStream
from mgrpo.errors import EngineError
from mgrpo.rollout.engine import Shapes

_PACKAGE = "vllm.distributed.weight_transfer"


class NcclSender:
    """The NCCL group of this process and the workers of one server."""

    def __init__(self, url: str, host: str, num_workers: int, dtype: torch.dtype, shapes: Shapes):
        self.dtype, self.shapes = dtype, shapes
        self._weights: WeightStream | None = None
        try:
            engine, base, clients = (
                importlib.import_module(f"{_PACKAGE}.{name}") for name in ("nccl_engine", "base", "clients")
            )
            info, sender = engine.NCCLTrainerInitInfo, engine.NCCLTrainerWeightTransferEngine
            client, source = clients.HTTPVLLMWeightSyncClient(url), self._make_source(base)
        except (ImportError, AttributeError) as error:
            raise EngineError(
                f"start: --engine.transfer nccl needs a vLLM with {_PACKAGE} on the trainer's side, got "
                f"{type(error).__name__}: {error}. Take --engine.transfer http."
            ) from error
        with socket.socket() as free:
            free.bind((host, 0))
            port = free.getsockname()[1]
        # The trainer is rank 0, the workers follow.
        meeting = info(master_address=host, master_port=port, world_size=1 + num_workers, rank=0)
        self._sender = self._ask(lambda: sender.trainer_init(meeting, client=client, source=source), "start")

    def send(self, weights: WeightStream) -> None:
        """Replaces every tensor of the server's model."""
        self._weights = weights
        self._ask(self._sender.send_weights, "update_weights")

    def _make_source(self, base: Any) -> Any:
        """The object that vLLM asks for names, shapes and tensors at every update."""
        outer = self

        class Source(base.WeightSource):
            def metadata(self) -> list[Any]:
                assert outer._weights is not None
                return [base.ParamMeta(name, outer.dtype, outer.shapes[name]) for name in outer._weights.names]

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                assert outer._weights is not None
                return ((name, tensor.to(outer.dtype)) for name, tensor in outer._weights)

        return Source()

    @staticmethod
    def _ask(call: Any, what: str) -> Any:
        try:
            return call()
        except Exception as error:
            raise EngineError(f"{what}: vLLM's weight transfer failed with {type(error).__name__}: {error}") from error
