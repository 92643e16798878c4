"""An engine with a slot for each model and weights of its own: two servers, which may be slow, in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mgrpo.models.load import LoadedModel
from mgrpo.rollout.engine import Engine
from mgrpo.rollout.stop import StopTexts
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.types import Rollouts, Sampling, Source, WeightTag

URLS = ("http://127.0.0.1:1", "http://127.0.0.1:2")
AHEAD: dict[str, Any] = {"rollout.ahead": 1, "engine.name": "vllm", "engine.placement": "server"}


class TwinEngine(Engine):
    """Refuses weights while it generates.

    Attributes:
        events: ("update", tag), and ("start", tag) and ("end", tag) of a generation, in order.
    """

    num_weight_slots = 2

    def __init__(self, loaded: LoadedModel, *, delay_s: float = 0.0, stop: StopTexts | None = None):
        options: dict[str, Any] = {"eos_ids": loaded.eos_ids, "pad_id": loaded.pad_id, "dtype": torch.float32}
        sources: tuple[Source, ...] = ("policy", "momentum")
        self.engines = {s: TransformersEngine(loaded.model, **options, batch_size=64, stop=stop) for s in sources}
        self.delay_s, self.at_work, self.lock = delay_s, 0, threading.Lock()
        self.events: list[tuple[str, WeightTag]] = []

    def update_weights(self, weights: Mapping[str, torch.Tensor], tag: WeightTag) -> None:
        assert self.at_work == 0, f"{tag} arrives in the middle of a generation"
        self.events.append(("update", tag))
        self.engines[tag.source].update_weights({name: w.detach().clone() for name, w in weights.items()}, tag)

    def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, tag: WeightTag) -> Rollouts:
        with self.lock:
            self.at_work += 1
            self.events.append(("start", tag))
        try:
            time.sleep(self.delay_s)
            return self.engines[tag.source].generate(prompts, n, sampling, tag)
        finally:
            with self.lock:
                self.at_work -= 1
                self.events.append(("end", tag))
