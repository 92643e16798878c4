"""A rollout engine for verl's registry, `rollout.name=tiny`: a transformers model in an actor of Ray.

It stands where vLLM or SGLang would. Asleep, it has neither weights nor answers, as with verl's `free_cache_engine`.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import ray
import torch
import verl.workers.rollout.base as rollout_base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

SERVER = "tiny_server"


class TinyServer:
    """Samples one token at a time; every request and every change of weights is a line of TINY_ROLLOUT_LOG."""

    def __init__(self, path: str):
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.asleep, self.version, self.loads = True, -1, 0

    def _log(self, **event: Any) -> None:
        with open(os.environ["TINY_ROLLOUT_LOG"], "a") as file:
            file.write(json.dumps(event) + "\n")

    async def load(self, weights: dict[str, torch.Tensor], global_steps: int | None) -> None:
        assert self.asleep, "weights may come only while the engine sleeps"
        self.model.load_state_dict(weights, strict=True)
        self.version, self.loads = global_steps, self.loads + 1
        norm = sum(float(w.double().pow(2).sum()) for w in weights.values()) ** 0.5
        self._log(event="load", version=self.version, norm=norm)

    async def wake(self) -> None:
        self.asleep = False

    async def sleep(self) -> None:
        self.asleep = True

    async def clear_kv_cache(self) -> None:
        pass

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        assert not self.asleep, "a request to an engine that sleeps"
        temperature = sampling_params.get("temperature", 1.0)
        ids, logprobs = list(prompt_ids), []
        while len(logprobs) < int(os.environ["TINY_ROLLOUT_TOKENS"]):
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            scaled = (logits / (temperature or 1.0)).log_softmax(-1)
            token = int(scaled.exp().multinomial(1)) if temperature else int(scaled.argmax())
            ids.append(token)
            logprobs.append(float(scaled[token]))
            if token == self.model.config.eos_token_id:
                break
            await asyncio.sleep(0)
        self._log(event="generate", load=self.loads)
        return TokenOutput(
            token_ids=ids[len(prompt_ids) :], log_probs=logprobs, extra_fields={"global_steps": self.version}
        )


class TinyReplica(RolloutReplica):
    """One server."""

    async def launch_servers(self) -> None:
        server = ray.remote(TinyServer).options(name=SERVER, num_cpus=0, max_concurrency=100)
        self._server_handle = server.remote(self.model_config.path)
        self._server_address = SERVER
        self.servers = [self._server_handle]


class TinyAdapter(BaseRollout):
    """The side of the training worker."""

    async def resume(self, tags: list[str]) -> None:
        if "kv_cache" in tags:
            await ray.get_actor(SERVER).wake.remote()

    async def release(self) -> None:
        await ray.get_actor(SERVER).sleep.remote()

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        copied = {name: tensor.detach().float().clone() for name, tensor in weights}
        await ray.get_actor(SERVER).load.remote(copied, global_steps)


RolloutReplicaRegistry.register("tiny", lambda: TinyReplica)
rollout_base._ROLLOUT_REGISTRY[("tiny", "async")] = "tiny_rollout.TinyAdapter"
