"""The embedded engine: a decode loop over a transformers model.

Unlike `model.generate` it prefills each prompt once for all its n samples, keeps only unfinished sequences in the
batch, and shares storage with the trainer's weights where dtype and device agree. Models whose cache does not allow
that are decoded in another way of decoding.py, chosen by decoding_trial.py.
Letters: B prompts, n rollouts a prompt, R = B * n sequences, L response tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedModel

from mgrpo.distributed.exchange import WeightStream
from mgrpo.distributed.world import ALONE, World
from mgrpo.models.adapter import adapted_layers
from mgrpo.rollout.decoding_trial import choose_way, tolerates_cast, trial_logprobs
from mgrpo.rollout.draws import uniform
from mgrpo.rollout.engine import Engine, check_tag, check_weights
from mgrpo.rollout.stop import StopTexts
from mgrpo.types import Rollouts, Sampling, WeightTag

# A batch is compacted once this share of its sequences has finished: copying the cache costs about one step.
COMPACT_SHARE = 0.25


class TransformersEngine(Engine):
    """Rollouts from a copy of `model`'s structure, on its device."""

    weights_are_shared = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        dtype: torch.dtype,
        batch_size: int,
        stop: StopTexts | None = None,
        world: World = ALONE,
    ):
        self.world = world
        # The frozen weights of a model with adapters are the caller's own, and no update replaces them.
        own = [] if not adapted_layers(model) else [p for p in model.parameters() if not p.requires_grad]
        self.fixed = {id(p): p for p in own}
        self.model = copy.deepcopy(model, dict[int, Any](self.fixed)).eval().requires_grad_(False)
        self.device = next(model.parameters()).device
        self.way = choose_way(self.model, pad_id)
        self.autocast = None if dtype == torch.float32 else dtype
        if self.autocast and not self.fixed:
            self.autocast = self._cast(model, pad_id, dtype)
        self.stop = stop
        ends = {*eos_ids, *(stop.token_ids if stop else ())}
        self.eos_ids = torch.tensor(sorted(ends), device=self.device)
        self.pad_id = pad_id
        self.batch_size = batch_size
        self.held: WeightTag | None = None

    def _cast(self, model: PreTrainedModel, pad_id: int, dtype: torch.dtype) -> torch.dtype | None:
        """Casts the weights to `dtype`; if it does not tolerate that, undoes it and returns `dtype`."""
        expected = trial_logprobs(self.model, pad_id, dtype)
        for parameter in self.model.parameters():  # not the buffers: rotary frequencies stay in fp32
            parameter.data = parameter.data.to(dtype)
        if tolerates_cast(self.model, self.way, pad_id, dtype, expected):
            return None
        for parameter, own in zip(self.model.parameters(), model.parameters(), strict=True):
            parameter.data = own.data
        return dtype

    def update_weights(self, weights: Mapping[str, torch.Tensor], tag: WeightTag) -> None:
        """Shares the given tensors where dtype and device agree, copies them elsewhere, and gathers sharded ones.

        Of a model with adapters these are A and B, under the names of the policy's parameters.
        """
        with WeightStream(weights, self.world, dtype=next(self.model.parameters()).dtype) as stream:
            own: dict[str, torch.Tensor] = self.model.state_dict(keep_vars=True)
            if self.fixed:  # then buffers do not change either
                own = {name: p for name, p in self.model.named_parameters() if id(p) not in self.fixed}
            check_weights(weights, {name: tuple(target.shape) for name, target in own.items()})
            once = set({target: name for name, target in own.items()}.values())  # a tied weight
            for name, tensor in stream:
                if name in once:
                    own[name].data = tensor.to(device=own[name].device, dtype=own[name].dtype)
        self.held = tag

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, tag: WeightTag) -> Rollouts:
        """Samples n responses to each prompt; prompts of similar length are decoded together."""
        check_tag(self.held, tag)
        num_rows = len(prompts) * n
        tokens = torch.full((num_rows, sampling.max_new_tokens), self.pad_id)
        logprobs = torch.zeros(num_rows, sampling.max_new_tokens)
        lengths = torch.zeros(num_rows, dtype=torch.int64)
        truncated = torch.zeros(num_rows, dtype=torch.bool)
        for chosen in self._batches(prompts, max(self.batch_size // max(n, 1), 1)):
            for samples in torch.arange(n).split(self.batch_size):
                rows = (torch.tensor(chosen)[:, None] * n + samples).flatten()
                noise = self._noise(chosen, samples, sampling)
                with torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext():
                    batch = self._decode([prompts[b] for b in chosen], len(samples), sampling, noise)
                tokens[rows], logprobs[rows], lengths[rows], truncated[rows] = (part.cpu() for part in batch)
        longest = int(lengths.max()) if num_rows else 0
        return Rollouts(
            tokens=tokens[:, :longest].clone(),
            lengths=lengths,
            logprobs=logprobs[:, :longest].clone(),
            truncated=truncated,
            num_per_prompt=n,
            tag=tag,
        )

    def _noise(self, chosen: list[int], samples: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        """[L, R] noise of the samples of chosen prompts."""
        prompts = torch.tensor([sampling.index(b) for b in chosen]).repeat_interleave(len(samples)).to(self.device)
        return uniform(sampling.seed, prompts, samples.repeat(len(chosen)).to(self.device), sampling.max_new_tokens)

    def _decode(
        self, prompts: list[Sequence[int]], n: int, sampling: Sampling, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decodes one batch with `noise` [L, R]; returns tokens and logprobs [R, L], lengths and truncated [R]."""
        batch = self.way(self.model, prompts, n, self.pad_id)
        num_rows = len(prompts) * n
        tokens = torch.full((num_rows, sampling.max_new_tokens), self.pad_id, device=self.device)
        logprobs = torch.zeros(num_rows, sampling.max_new_tokens, device=self.device)
        lengths = torch.full((num_rows,), sampling.max_new_tokens, device=self.device)
        truncated = torch.ones(num_rows, dtype=torch.bool, device=self.device)
        active = torch.arange(num_rows, device=self.device)  # rows still in the batch
        alive = torch.ones(num_rows, dtype=torch.bool, device=self.device)  # of those, the unfinished
        for t in range(sampling.max_new_tokens):
            token, logprob = sample(batch.logits, sampling, noise[t, active])
            rows = active[alive]
            tokens[rows, t], logprobs[rows, t] = token[alive], logprob[alive]
            ended = alive & torch.isin(token, self.eos_ids)
            if self.stop:
                ended |= alive & self.stop.ended(tokens[:, : t + 1], active).to(self.device)
            lengths[active[ended]], truncated[active[ended]] = t + 1, False
            alive = alive & ~ended
            num_alive = int(alive.sum())
            if num_alive == 0 or t + 1 == sampling.max_new_tokens:
                break
            if batch.drops_rows and num_alive <= (1 - COMPACT_SHARE) * len(active):
                kept = alive.nonzero().flatten()
                batch.keep(kept)
                active, alive, token = active[kept], alive[kept], token[kept]
            batch.advance(token)
        return tokens, logprobs, lengths, truncated

    def _batches(self, prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
        """Splits the prompts into batches of at most `size` and of similar length, or of one length if required."""
        order = sorted(range(len(prompts)), key=lambda b: len(prompts[b]))
        groups = [order]
        if self.way.equal_lengths:
            groups = [list(group) for _, group in groupby(order, key=lambda b: len(prompts[b]))]
        for group in groups:
            for start in range(0, len(group), size):
                yield group[start : start + size]


def sample(logits: torch.Tensor, sampling: Sampling, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token a row of [R, V]; returns tokens [R] and log-probs [R] fp32 after temperature and top-p.

    `noise` [R] fp64 in (0, 1) picks the token whose part of the cumulative distribution it falls into.
    """
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return token, torch.log_softmax(logits.float(), -1).gather(1, token[:, None])[:, 0]
    logprobs = torch.log_softmax(logits.float() / sampling.temperature, -1)
    if sampling.top_p < 1:
        logprobs = _nucleus(logprobs, sampling.top_p)
    mass = logprobs.exp().cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(mass, noise[:, None] * mass[:, -1:], right=True)
    token = token.clamp_max_(logits.shape[1] - 1)  # for non-finite logits
    return token[:, 0], logprobs.gather(1, token)[:, 0]


def _nucleus(logprobs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keeps the smallest set of tokens whose mass reaches top_p, renormalised; the others get -inf."""
    ranked, index = logprobs.sort(-1, descending=True)
    mass_before = ranked.exp().cumsum(-1) - ranked.exp()
    ranked = ranked.masked_fill(mass_before >= top_p, -torch.inf)
    return torch.log_softmax(torch.empty_like(logprobs).scatter_(-1, index, ranked), -1)
