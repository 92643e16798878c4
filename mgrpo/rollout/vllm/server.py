"""Rollouts from vLLM servers: other processes, on other GPUs or hosts.

The trainer offers the weights as a safetensors file over HTTP, under an unguessable path, and asks the server's worker
(mgrpo.rollout.worker) to fetch them; or it sends them by NCCL. B prompts, n rollouts a prompt.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Literal

import torch

from mgrpo.distributed.exchange import WeightStream
from mgrpo.distributed.world import ALONE, World
from mgrpo.errors import EngineError, StaleWeightsError
from mgrpo.rollout.engine import Engine
from mgrpo.rollout.stop import StopTexts
from mgrpo.rollout.vllm.base import CACHE_REFUSED, CheckedEngine, Progress, Response
from mgrpo.rollout.vllm.client import HttpClient
from mgrpo.rollout.vllm.process import ServerProcess
from mgrpo.rollout.weights.http import offer
from mgrpo.rollout.weights.nccl import NcclSender
from mgrpo.types import Rollouts, Sampling, Source, WeightTag

MAX_REQUESTS = 64  # concurrent, to one server; vLLM batches across them
LOOK_S = 0.5
# What vLLM's OpenAI server writes for minus infinity, which JSON lacks.
MINUS_INFINITY = -9999.0


class ServerEngine(CheckedEngine):
    """One vLLM server."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        dtype: torch.dtype,
        max_length: int,
        url: str,
        weights_host: str = "127.0.0.1",
        transfer: Literal["http", "nccl"] = "http",
        timeout_s: float = 600.0,
        process: ServerProcess | None = None,
        stop: StopTexts | None = None,
        world: World = ALONE,
    ):
        super().__init__(model, eos_ids=eos_ids, pad_id=pad_id, dtype=dtype, stop=stop, world=world)
        self.timeout_s, self.process = timeout_s, process
        self._http = HttpClient(url, last_words=process.last_words) if process else HttpClient(url)
        self._host, self._transfer = weights_host, transfer
        self._nccl: NcclSender | None = None
        card = self._http.call("/v1/models", what="start")["data"][0]
        self._name = card["id"]
        if card.get("max_model_len", max_length) < max_length:
            raise EngineError(f"start: {url} must take {max_length} tokens, it takes {card['max_model_len']}.")
        self._state("start")

    def _send_weights(self, weights: WeightStream, version: str) -> None:
        call = partial(self._http.call, what="update_weights", timeout_s=self.timeout_s)
        call("/pause?mode=abort", {})
        if self._transfer == "nccl":
            self._broadcast(weights, version)
        else:
            with offer(weights, self.shapes, self.dtype, self._host) as (url, sha256):
                call("/collective_rpc", {"method": "mgrpo_load", "args": [url, sha256, version]})
        emptied = call("/reset_prefix_cache", {})
        if isinstance(emptied, dict) and emptied.get("success") is False:
            raise EngineError(CACHE_REFUSED)
        call("/resume", {})

    def _broadcast(self, weights: WeightStream, version: str) -> None:
        """Sends weights from GPU to GPU; the first call makes the group. Meanwhile the server has no version."""
        name = partial(self._http.call, "/collective_rpc", what="update_weights", timeout_s=self.timeout_s)
        name({"method": "mgrpo_name", "args": [""]})
        if self._nccl is None:
            num_workers = self._http.call("/get_world_size", what="start")["world_size"]
            self._nccl = NcclSender(self._http.url, self._host, num_workers, self.dtype, self.shapes)
        self._nccl.send(weights)
        name({"method": "mgrpo_name", "args": [version]})

    def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, tag: WeightTag) -> Rollouts:
        """See CheckedEngine; raises StaleWeightsError if the server was restarted or updated by another run."""
        rollouts = super().generate(prompts, n, sampling, tag)
        for state in self._state("generate"):
            if state["version"] != str(tag):
                raise StaleWeightsError(
                    f"generate: {self._http.url} must hold {tag}, it holds {state['version']}. Does another run use it?"
                )
        return rollouts

    def _sample(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int) -> list[Response]:
        # A request has one seed, so every prompt needs its own request.
        bodies = [
            {
                "model": self._name,
                "prompt": list(prompt),
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,  # a server without a tokenizer has no texts
                **self._parameters(b, n, sampling, seed),
            }
            for b, prompt in enumerate(prompts)
        ]
        found: list[list[Response]] = [[] for _ in bodies]
        # The limit counts from the last finished prompt, so that queued requests do not time out.
        with ThreadPoolExecutor(MAX_REQUESTS) as pool, Progress(len(prompts), "rollouts") as progress:
            ask = self._http.call
            pending: dict[Future[Any], int] = {
                pool.submit(ask, "/v1/completions", body, what="generate", timeout_s=None): b
                for b, body in enumerate(bodies)
            }
            try:
                last = looked = time.monotonic()
                while pending:
                    done, _ = wait(pending, timeout=LOOK_S, return_when=FIRST_COMPLETED)
                    now = time.monotonic()
                    last = now if done else last
                    if now - last > self.timeout_s:
                        raise EngineError(
                            f"generate: {self._http.url} must finish a prompt every {self.timeout_s:g} s, it did "
                            "not. Raise --engine.timeout-s if responses are that slow."
                        )
                    if now - looked > LOOK_S:
                        looked = now
                        self._look()
                    for future in done:
                        b = pending.pop(future)
                        found[b] = [_read(choice) for choice in future.result()["choices"]]
                        progress.finished(found[b], self.kv_cache_usage)
            finally:
                for future in pending:
                    future.cancel()
                if pending:
                    self._http.hang_up()
        return self._flatten(found, n, sampling)

    def _look(self) -> None:
        """Observes the KV cache."""
        text = self._http.call("/metrics", what="generate", timeout_s=self.timeout_s)
        for line in str(text).splitlines():
            if line.startswith("vllm:kv_cache_usage_perc"):
                self._observe_kv_cache(float(line.split()[-1]))

    def _state(self, what: str) -> list[dict[str, Any]]:
        """Weight version and process id of each worker."""
        reply = self._http.call("/collective_rpc", {"method": "mgrpo_state"}, what=what, timeout_s=self.timeout_s)
        return [json.loads(state) if isinstance(state, str) else state for state in reply["results"]]

    def close(self) -> None:
        """Ends waiting calls, and the server if it was started here."""
        super().close()
        self._http.hang_up()
        if self.process is not None:
            self.process.close()


class EnginePair(Engine):
    """Two servers, one for each source: momentum and policy generate concurrently."""

    num_weight_slots = 2

    def __init__(self, policy: ServerEngine, momentum: ServerEngine):
        self.engines: dict[Source, ServerEngine] = {"policy": policy, "momentum": momentum}

    def update_weights(self, weights: Mapping[str, torch.Tensor], tag: WeightTag) -> None:
        """See Engine."""
        self.engines[tag.source].update_weights(weights, tag)

    def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, tag: WeightTag) -> Rollouts:
        """See Engine."""
        return self.engines[tag.source].generate(prompts, n, sampling, tag)

    def stats(self) -> Mapping[str, float | None]:
        """Rollouts drawn again by both so far, and the larger share of the KV cache."""
        usages = [e.kv_cache_usage for e in self.engines.values() if e.kv_cache_usage is not None]
        redrawn = sum(engine.redrawn for engine in self.engines.values())
        return {"kv_cache_usage": max(usages, default=None), "redrawn": redrawn}

    def close(self) -> None:
        """Closes both."""
        with contextlib.ExitStack() as stack:
            for engine in self.engines.values():
                stack.callback(engine.close)


def _read(choice: Mapping[str, Any]) -> Response:
    """One rollout of a reply."""
    logprobs = [-float("inf") if x is None or x <= MINUS_INFINITY else x for x in choice["logprobs"]["token_logprobs"]]
    tokens = choice["token_ids"]
    if len(tokens) != len(logprobs):
        raise EngineError(f"generate: every token must have a log-prob, {len(tokens)} have {len(logprobs)}.")
    return Response(tokens, logprobs, choice["finish_reason"] == "length")
