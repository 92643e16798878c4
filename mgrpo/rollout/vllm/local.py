"""Rollouts from vLLM in this process: one engine whose weights alternate between momentum and policy.

It takes token ids, returns log-probs after temperature and top-p, and starts from the model's configuration alone: no
weights are written to disk. Letters: B prompts, n rollouts a prompt, L longest response in tokens.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from mgrpo.distributed.exchange import WeightStream
from mgrpo.distributed.world import ALONE, World
from mgrpo.errors import EngineError, StaleWeightsError
from mgrpo.rollout.stop import StopTexts
from mgrpo.rollout.vllm.base import CACHE_REFUSED, CheckedEngine, Progress, Response
from mgrpo.rollout.weights.in_process import make_writer
from mgrpo.types import Sampling

# Seconds between readings of the KV cache, each of which takes about a millisecond.
LOOK_S = 0.1


class VllmEngine(CheckedEngine):
    """vLLM in this process."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        dtype: torch.dtype,
        max_length: int,
        options: Mapping[str, Any],
        timeout_s: float = 600.0,
        stop: StopTexts | None = None,
        world: World = ALONE,
        make_llm: Any = None,
    ):
        super().__init__(model, eos_ids=eos_ids, pad_id=pad_id, dtype=dtype, stop=stop, world=world)
        self.timeout_s = timeout_s
        if world.size > 1:
            options = {**options, "distributed_executor_backend": "external_launcher"}  # keeps the run's groups
        self._folder = TemporaryDirectory(prefix="mgrpo-vllm-")
        arguments = describe_model(model, self._folder.name, dtype, max_length, stop) | {"disable_log_stats": False}
        self._sleeps = bool(options.get("enable_sleep_mode"))
        self._asleep = False
        with _keeping_process_state(), _engine_errors("start"):
            self._llm = (make_llm or start)(**(arguments | dict(options)))
        self._write = make_writer(self._llm)

    def _send_weights(self, weights: WeightStream, version: str) -> None:
        with _keeping_process_state(), _engine_errors("update_weights"):
            if self._asleep:
                self._llm.wake_up()
                self._asleep = False
            self._write(weights, version)
            # vLLM keeps the cache of prompts under the old weights.
            emptied = self._llm.reset_prefix_cache()
        if emptied is False:
            raise EngineError(CACHE_REFUSED)

    def sleep(self) -> None:
        """Moves weights to the host and drops the KV cache until the next update, with --engine.sleep."""
        if self._sleeps and not self._asleep:
            # Level 2 drops buffers too, which no update restores.
            with _keeping_process_state(), _engine_errors("sleep"):
                self._llm.sleep(level=1)
            self.held, self._asleep = None, True

    def _sample(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int) -> list[Response]:
        found: dict[str, list[Response]] = {}
        names = [f"{seed}-{b}" for b in range(len(prompts))]
        with _keeping_process_state(), _engine_errors("generate"), Progress(len(prompts), "rollouts") as progress:
            engine = self._llm.llm_engine
            try:
                for b, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
                    engine.add_request(name, {"prompt_token_ids": list(prompt)}, self._request(b, n, sampling, seed))
                for output in self._finished():
                    found[output.request_id] = self._read(output)
                    progress.finished(found[output.request_id], self.kv_cache_usage)
            finally:
                if waiting := [name for name in names if name not in found]:
                    engine.abort_request(waiting)
        return self._flatten([found.get(name, []) for name in names], n, sampling)

    def _request(self, b: int, n: int, sampling: Sampling, seed: int) -> Any:
        """Sampling parameters of one prompt, whose output vLLM returns once, when it is complete."""
        params = importlib.import_module("vllm.sampling_params")
        options = {"detokenize": self.stop is not None, "output_kind": params.RequestOutputKind.FINAL_ONLY}
        return params.SamplingParams(**self._parameters(b, n, sampling, seed), **options)

    def _finished(self) -> Iterator[Any]:
        """Outputs of prompts as they finish; raises EngineError if none does for `timeout_s`."""
        engine = self._llm.llm_engine
        last = looked = time.monotonic()
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    last = time.monotonic()
                    yield output
            now = time.monotonic()
            if now - last > self.timeout_s:
                raise EngineError(
                    f"generate: a prompt must finish every {self.timeout_s:g} s, none did. "
                    "Raise --engine.timeout-s if responses are that slow."
                )
            if now - looked > LOOK_S:
                looked = now
                self._look()

    def _look(self) -> None:
        """Observes the KV cache, in versions that have a metric of it."""
        for metric in getattr(self._llm, "get_metrics", list)():
            if metric.name == "vllm:kv_cache_usage_perc":
                self._observe_kv_cache(metric.value)

    def _read(self, output: Any) -> list[Response]:
        """Rollouts of one prompt."""
        self._check_version(output)
        return [
            Response(
                list(sample.token_ids),
                [found[token].logprob for token, found in zip(sample.token_ids, sample.logprobs, strict=True)],
                sample.finish_reason == "length",
            )
            for sample in output.outputs
        ]

    def _check_version(self, output: Any) -> None:
        """Raises StaleWeightsError if vLLM reports another weight version for an output."""
        for sample in output.outputs:
            for span in getattr(sample, "weight_versions", None) or []:
                if span.version != str(self.held):
                    raise StaleWeightsError(f"generate: vLLM must use weights {self.held!s}, it used {span.version}.")

    def close(self) -> None:
        """Frees the engine's memory and removes its folder."""
        super().close()
        self._folder.cleanup()
        core: Any = getattr(self._llm.llm_engine, "engine_core", None)
        if self.world.size > 1:  # it would end the process groups of the run; the end of the process frees the memory
            if (at_exit := getattr(core, "_finalizer", None)) is not None:
                at_exit.detach()
        elif hasattr(core, "shutdown"):
            with _engine_errors("close"):
                core.shutdown()


def describe_model(
    model: torch.nn.Module, folder: str, dtype: torch.dtype, max_length: int, stop: StopTexts | None = None
) -> dict[str, Any]:
    """Writes the configuration from which vLLM builds the model, without its weights; returns vLLM's arguments.

    The tokenizer is written for stop texts only.
    """
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]  # unset in a model that was never saved
    config.save_pretrained(folder)
    if stop is not None:
        stop.tokenizer.save_pretrained(folder)
    return {
        "model": folder,
        "skip_tokenizer_init": stop is None,
        "load_format": "dummy",
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_length,
        "logprobs_mode": "processed_logprobs",
    }


def start(**arguments: Any) -> Any:
    """A vLLM engine in this process."""
    require_vllm()
    # The weights of an engine in another process cannot be written from here.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    return importlib.import_module("vllm").LLM(**arguments)


def require_vllm() -> None:
    """Raises EngineError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineError("rollout: vllm must be installed for --engine.name vllm. pip install vllm.")


@contextlib.contextmanager
def _keeping_process_state() -> Iterator[None]:
    """Restores the process's seeds, threads and default dtype, which vLLM changes."""
    python, arrays, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    threads, set_num_threads, dtype = torch.get_num_threads(), torch.set_num_threads, torch.get_default_dtype()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(torch_state)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _engine_errors(what: str) -> Iterator[None]:
    """Turns every error of vLLM, which has no base class of its own, into EngineError."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise EngineError(f"{what}: vLLM failed with {type(error).__name__}: {lines[0] if lines else ''}") from error
