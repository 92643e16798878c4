"""The base of all vLLM engines: it checks the weights and prompts that go in and the rollouts that come out.

Letters: B prompts, n rollouts a prompt, L longest response in tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from mgrpo.distributed.exchange import WeightStream
from mgrpo.distributed.world import World
from mgrpo.errors import EngineError
from mgrpo.models.adapter import plain_state_dict
from mgrpo.rollout.engine import Engine, check_tag
from mgrpo.rollout.stop import StopTexts
from mgrpo.rollout.weights.sending import sending
from mgrpo.types import Rollouts, Sampling, WeightTag

# How often empty sequences and those with non-finite log-probs are drawn again.
REDRAWS = 2
# Seeds of vLLM are signed 32-bit numbers in some of its kernels.
SEEDS = 2**31
PROGRESS_AFTER_S = 5.0
CACHE_REFUSED = "update_weights: vLLM must empty its prefix cache, it refused. Is another request running?"


class Response(NamedTuple):
    """One rollout."""

    tokens: list[int]
    logprobs: list[float]  # after temperature and top-p
    truncated: bool

    @property
    def is_finite(self) -> bool:
        """Whether it has tokens, each with a finite log-prob."""
        return bool(self.tokens) and all(np.isfinite(self.logprobs))


class CheckedEngine(Engine, ABC):
    """Rollouts from vLLM with the weights of the last update."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        dtype: torch.dtype,
        stop: StopTexts | None,
        world: World,
    ):
        self.dtype, self.world = dtype, world
        self.eos_ids, self.pad_id, self.stop = sorted({*eos_ids, *(stop.token_ids if stop else ())}), pad_id, stop
        self.shapes = {name: tuple(tensor.shape) for name, tensor in plain_state_dict(model).items()}
        self.vocabulary = model.get_input_embeddings().weight.shape[0]  # pyright: ignore
        self.held: WeightTag | None = None
        self.redrawn = 0
        self.kv_cache_usage: float | None = None  # largest share of the KV cache in use during a call

    def update_weights(self, weights: Mapping[str, torch.Tensor], tag: WeightTag) -> None:
        """Sends a full state dict: every name, tied ones twice, because vLLM does not report missing ones."""
        self.held = None
        with sending(weights, self.shapes, self.world, self.dtype) as stream:
            self._send_weights(stream, str(tag))
        self.held = tag

    def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, tag: WeightTag) -> Rollouts:
        """Samples n responses to each prompt; the same seed gives the same tokens, whatever else is in the batch."""
        check_tag(self.held, tag)
        for b, prompt in enumerate(prompts):
            # vLLM hangs after an unknown token.
            if not prompt or min(prompt) < 0 or max(prompt) >= self.vocabulary:
                found = f"{min(prompt)} to {max(prompt)}" if prompt else "none"
                raise EngineError(f"generate: prompt {b} must have token ids in [0, {self.vocabulary}), got {found}.")
        self.kv_cache_usage = None
        rows = self._sample(prompts, n, sampling, sampling.seed)
        for attempt in range(REDRAWS):
            bad = [row for row, response in enumerate(rows) if not response.is_finite]
            if not bad:
                break
            self.redrawn += len(bad)
            single = replace(sampling, indices=tuple(sampling.index(row // n) * n + row % n for row in bad))
            again = self._sample([prompts[row // n] for row in bad], 1, single, sampling.seed + (attempt + 1) * 7919)
            for row, response in zip(bad, again, strict=True):
                rows[row] = response
        for row, response in enumerate(rows):
            if not response.is_finite:
                raise EngineError(
                    f"generate: every rollout must have tokens with finite log-probs, prompt {row // n} got "
                    f"{len(response.tokens)} tokens after {REDRAWS} more draws."
                )
        return self._pack(rows, n, tag)

    def close(self) -> None:
        """See Engine."""
        self.held = None

    def stats(self) -> Mapping[str, float | None]:
        """Rollouts drawn again so far, and the largest share of the KV cache during the last call."""
        return {"kv_cache_usage": self.kv_cache_usage, "redrawn": self.redrawn}

    @abstractmethod
    def _send_weights(self, weights: WeightStream, version: str) -> None:
        """Replaces the weights in vLLM and empties its prefix cache."""

    @abstractmethod
    def _sample(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int) -> list[Response]:
        """B * n rollouts."""

    def _parameters(self, b: int, n: int, sampling: Sampling, seed: int) -> dict[str, Any]:
        """Sampling parameters of prompt b's request; vLLM seeds its rollout i with seed + i."""
        return {
            "n": 1 if sampling.temperature == 0 else n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": self.eos_ids,
            "seed": (seed + sampling.index(b) * n) % SEEDS,
            "logprobs": 0,
            **({"stop": list(self.stop.texts), "include_stop_str_in_output": True} if self.stop else {}),
        }

    def _flatten(self, found: Sequence[list[Response]], n: int, sampling: Sampling) -> list[Response]:
        """The rollouts of all prompts in one list; a greedy one, decoded once, is repeated."""
        rows = [row for responses in found for row in (responses * n if sampling.temperature == 0 else responses)]
        if len(rows) != len(found) * n:
            raise EngineError(f"generate: vLLM must return {len(found) * n} rollouts, got {len(rows)}.")
        return rows if self.stop is None else [self._ended(row, self.stop) for row in rows]

    def _ended(self, response: Response, stop: StopTexts) -> Response:
        """Cuts a response after the token that completes a stop text, which vLLM may miss."""
        end = stop.end(response.tokens)
        return response if end is None else Response(response.tokens[:end], response.logprobs[:end], truncated=False)

    def _observe_kv_cache(self, usage: float) -> None:
        """Keeps the largest value of a call."""
        self.kv_cache_usage = max(usage, self.kv_cache_usage or 0.0)

    def _pack(self, rows: Sequence[Response], n: int, tag: WeightTag) -> Rollouts:
        """The responses as tensors, padded on the right."""
        lengths = torch.tensor([len(row.tokens) for row in rows], dtype=torch.int64)
        longest = int(lengths.max()) if rows else 0
        tokens = torch.full((len(rows), longest), self.pad_id)
        logprobs = torch.zeros(len(rows), longest)
        for i, row in enumerate(rows):
            tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
            logprobs[i, : len(row.tokens)] = torch.tensor(row.logprobs)
        return Rollouts(
            tokens=tokens,
            lengths=lengths,
            logprobs=logprobs,
            truncated=torch.tensor([row.truncated for row in rows], dtype=torch.bool),
            num_per_prompt=n,
            tag=tag,
        )


class Progress(tqdm):
    """Progress bar of a long call, on a terminal only: finished prompts, tokens a second and KV cache."""

    def __init__(self, num_prompts: int, what: str):
        self.num_tokens = 0
        super().__init__(
            total=num_prompts, desc=what, unit=" prompts", delay=PROGRESS_AFTER_S, leave=False, disable=None
        )

    def finished(self, responses: Sequence[Response], kv_cache_usage: float | None) -> None:
        """Counts one finished prompt."""
        self.num_tokens += sum(len(response.tokens) for response in responses)
        facts: MutableMapping[str, Any] = self.format_dict
        rate = self.num_tokens / max(facts["elapsed"], 1e-9)
        cache = "" if kv_cache_usage is None else f", KV cache {kv_cache_usage:.0%}"
        self.set_postfix_str(f"{rate:,.0f} tok/s{cache}", refresh=False)
        self.update()
