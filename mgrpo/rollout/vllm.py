"""Rollouts from vLLM in this process: one engine whose weights change between momentum and policy.

It gets token ids, gives log-probs after temperature and top-p, and starts from the model's configuration alone: no
weight passes over a disk. Letters: B prompts, n rollouts a prompt, L longest response in tokens.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import os
import random
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mgrpo.rollout.engine import (
    EngineError,
    Rollouts,
    Sampling,
    Source,
    StaleWeightsError,
    check_loaded,
    check_weights,
)
from mgrpo.rollout.publish import make_publisher

# Sequences that come back empty or with an impossible log-prob are drawn again so many times.
REDRAWS = 2
# Seeds of vLLM are signed 32-bit numbers in some of its kernels.
SEEDS = 2**31
PROGRESS_AFTER_S = 5.0


class VllmEngine:
    """Rollouts from vLLM under the weights loaded last."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        dtype: torch.dtype,
        max_length: int,
        options: Mapping[str, Any],
        make_llm: Any = None,
    ):
        self.eos_ids, self.pad_id = sorted(eos_ids), pad_id
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.vocabulary = model.get_input_embeddings().weight.shape[0]  # pyright: ignore
        self.loaded: tuple[Source, int] | None = None
        self.redrawn = 0
        self._folder = TemporaryDirectory(prefix="mgrpo-vllm-")
        config: Any = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]  # a model that was never saved does not say
        config.save_pretrained(self._folder.name)
        arguments = {
            "model": self._folder.name,
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": max_length,
            "logprobs_mode": "processed_logprobs",
        }
        with _keeping_process_state(), _engine_errors("start"):
            self._llm = (make_llm or start)(**(arguments | dict(options)))
        self._publisher = make_publisher(self._llm)

    def load(self, weights: Mapping[str, torch.Tensor], *, source: Source, version: int) -> None:
        """Hands over a full state dict: every name, tied ones twice, for vLLM takes a part without a word."""
        self.loaded = None
        check_weights(weights, self.shapes)
        with _keeping_process_state(), _engine_errors("load"):
            self._publisher.publish([(name, weights[name].detach()) for name in self.shapes], f"{source}@{version}")
            # Its cache knows prompts under the weights before; vLLM does not look.
            emptied = self._llm.reset_prefix_cache()
        if emptied is False:
            raise EngineError("load: vLLM must empty its prefix cache, it refused. Is another request running?")
        self.loaded = (source, version)

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, *, source: Source, version: int
    ) -> Rollouts:
        """Samples n responses to each prompt; the same seed gives the same tokens, whatever else is in the batch."""
        check_loaded(self.loaded, source, version)
        for b, prompt in enumerate(prompts):
            # After an unknown token vLLM hangs.
            if not prompt or min(prompt) < 0 or max(prompt) >= self.vocabulary:
                found = f"{min(prompt)} to {max(prompt)}" if prompt else "none"
                raise EngineError(f"generate: prompt {b} must have token ids in [0, {self.vocabulary}), got {found}.")
        rows = self._sample(prompts, n, sampling, sampling.seed)
        for attempt in range(REDRAWS):
            bad = [row for row, response in enumerate(rows) if not _is_possible(response)]
            if not bad:
                break
            self.redrawn += len(bad)
            again = self._sample([prompts[row // n] for row in bad], 1, sampling, sampling.seed + (attempt + 1) * 7919)
            for row, response in zip(bad, again, strict=True):
                rows[row] = response
        for row, response in enumerate(rows):
            if not _is_possible(response):
                raise EngineError(
                    f"generate: every rollout must have tokens with finite log-probs, prompt {row // n} got "
                    f"{len(response[0])} tokens after {REDRAWS} more draws."
                )
        return self._pack(rows, n, source, version)

    def _sample(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int
    ) -> list[tuple[list[int], list[float], bool]]:
        """Tokens, log-probs and whether the limit cut them, of B * n rollouts."""
        make_params = importlib.import_module("vllm").SamplingParams
        greedy = sampling.temperature == 0
        # vLLM seeds rollout i of a prompt with seed + i.
        params = [
            make_params(
                n=1 if greedy else n,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=self.eos_ids,
                seed=(seed + b * n) % SEEDS,
                logprobs=0,
                detokenize=False,
            )
            for b in range(len(prompts))
        ]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        bar = partial(_Progress, delay=PROGRESS_AFTER_S, leave=False, disable=None)
        with _keeping_process_state(), _engine_errors("generate"):
            outputs = self._llm.generate(requests, params, use_tqdm=bar)
        rows = []
        for output in outputs:
            self._check_version(output)
            responses = [
                (
                    list(sample.token_ids),
                    [found[token].logprob for token, found in zip(sample.token_ids, sample.logprobs, strict=True)],
                    sample.finish_reason == "length",
                )
                for sample in output.outputs
            ]
            rows += responses * n if greedy else responses
        if len(rows) != len(prompts) * n:
            raise EngineError(f"generate: vLLM must return {len(prompts) * n} rollouts, got {len(rows)}.")
        return rows

    def _check_version(self, output: Any) -> None:
        """Refuses what vLLM itself says was written by other weights."""
        assert self.loaded is not None
        expected = "@".join(map(str, self.loaded))
        for sample in output.outputs:
            for span in getattr(sample, "weight_versions", None) or []:
                if span.version != expected:
                    raise StaleWeightsError(f"generate: vLLM must write with {expected}, it wrote with {span.version}.")

    def _pack(
        self, rows: Sequence[tuple[list[int], list[float], bool]], n: int, source: Source, version: int
    ) -> Rollouts:
        """Pads on the right."""
        lengths = torch.tensor([len(tokens) for tokens, _, _ in rows], dtype=torch.int64)
        longest = int(lengths.max()) if rows else 0
        tokens = torch.full((len(rows), longest), self.pad_id)
        logprobs = torch.zeros(len(rows), longest)
        for row, (ids, values, _) in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
            logprobs[row, : len(ids)] = torch.tensor(values)
        return Rollouts(
            tokens=tokens,
            lengths=lengths,
            logprobs=logprobs,
            truncated=torch.tensor([cut for _, _, cut in rows], dtype=torch.bool),
            num_per_prompt=n,
            source=source,
            version=version,
        )

    def close(self) -> None:
        """Frees the engine's memory and removes its folder."""
        self.loaded = None
        self._folder.cleanup()
        core: Any = getattr(self._llm.llm_engine, "engine_core", None)
        if hasattr(core, "shutdown"):
            with _engine_errors("close"):
                core.shutdown()


class _Progress(tqdm):
    """Finished rollouts and tokens a second of a long call, on a terminal alone."""

    @property
    def format_dict(self) -> MutableMapping[str, Any]:
        """A bar that is switched off knows no time, by which vLLM divides."""
        facts = super().format_dict
        return {**facts, "elapsed": facts["elapsed"] or 1e-9}


def _is_possible(response: tuple[list[int], list[float], bool]) -> bool:
    """Whether a rollout has tokens, each with a finite log-prob."""
    tokens, logprobs, _ = response
    return bool(tokens) and all(np.isfinite(logprobs))


def start(**arguments: Any) -> Any:
    """A vLLM engine in this process."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineError("rollout: vllm must be installed for --rollout.engine vllm. pip install vllm.")
    # In another process its weights could not be written from here.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    return importlib.import_module("vllm").LLM(**arguments)


@contextlib.contextmanager
def _keeping_process_state() -> Iterator[None]:
    """The process's seeds, threads and default dtype, which vLLM changes, are as before in the end."""
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
    """Whatever vLLM raises is an EngineError here; it has no hierarchy of its own to tell apart."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise EngineError(f"{what}: vLLM failed with {type(error).__name__}: {lines[0] if lines else ''}") from error
