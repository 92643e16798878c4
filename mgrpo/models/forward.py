"""The forward pass over trajectories: log-probs and entropies of responses.

Letters: R trajectories, L longest response, T packed response tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

import mgrpo_kernels as K
from mgrpo.config import KernelsConfig
from mgrpo.config.distributed import LANES
from mgrpo.distributed.sharding import run_whole
from mgrpo.distributed.world import ALONE, World
from mgrpo.models.load import LoadedModel
from mgrpo.models.packing import PackedBatch, groups, pack, require_packing
from mgrpo.models.plain import plain_hidden, plain_logits
from mgrpo.types import TrajectoryBatch

# Larger logits of a micro-batch are not materialised; the fused linear op computes them in chunks.
MAX_LOGITS_BYTES = 256 * 2**20


class TokenLogProbs(NamedTuple):
    """Log-probs and entropies of response tokens, at the sampling temperature."""

    logprob: torch.Tensor  # [T] or [R, L] fp32
    entropy: torch.Tensor  # [T] or [R, L] fp32, nats
    self_certainty: torch.Tensor | None  # [T] or [R, L] fp32


class Forward:
    """Computes log-probs and entropies of responses at the sampling temperature, for any weights of a model.

    Every rank takes its share of the micro-batches; all ranks must call it with the same trajectories.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        temperature: float,
        kernels: KernelsConfig,
        micro_batch_tokens: int,
        packed: bool = False,
        world: World = ALONE,
        tree: bool = False,
    ):
        self.world = world
        self.lanes = LANES if tree else self.world.size
        self.pad_id, self.dtype, self.packed = loaded.pad_id, loaded.dtype, packed
        self.temperature, self.backend = temperature, kernels.backend
        self.micro_batch_tokens = micro_batch_tokens
        with self._autocast(next(loaded.model.parameters()).device):
            if packed:
                require_packing(loaded.model, self.dtype)
            self.has_plain_head = has_plain_head(loaded.model)

    def plan(self, trajectories: TrajectoryBatch, rows: torch.Tensor) -> list[list[int]]:
        """Splits trajectories `rows` [r] into micro-batches within the budget of tokens; the same on every rank.

        Micro-batch j is computed by rank j mod W. In tree mode the split does not depend on W.
        """
        return groups(trajectories, rows, budget=self.micro_batch_tokens, packed=self.packed, lanes=self.lanes)

    def own(self, trajectories: TrajectoryBatch, plan: list[list[int]]) -> Iterator[tuple[int, PackedBatch]]:
        """Indices and inputs of this rank's micro-batches.

        In place of an empty one it computes the cheapest other, because a sharded forward pass needs every rank.
        """
        for index in range(self.world.rank, len(plan), self.world.size):
            group = plan[index] or next(filter(None, reversed(plan)))
            yield index, pack(trajectories, torch.tensor(group), pad_id=self.pad_id, packed=self.packed)

    @torch.no_grad()
    def run(
        self,
        model: PreTrainedModel,
        trajectories: TrajectoryBatch,
        *,
        rows: torch.Tensor | None = None,
        self_certainty: bool = False,
    ) -> TokenLogProbs:
        """Log-probs of trajectories `rows` [r], all by default, without gradient; [R, L], zeros elsewhere."""
        mask = trajectories.mask
        plan = self.plan(trajectories, torch.arange(len(mask)) if rows is None else rows)
        padded = torch.zeros(3 if self_certainty else 2, *mask.shape)
        for index, batch in self.own(trajectories, plan):
            packed, part = self(model, batch, self_certainty=self_certainty), mask[batch.rows]
            for target, values in zip(padded, packed, strict=False) if plan[index] else ():
                assert values is not None
                target[batch.rows] = torch.zeros(part.shape).masked_scatter_(part, values.cpu())
        self.world.sum_(padded)
        return TokenLogProbs(padded[0], padded[1], padded[2] if self_certainty else None)

    def __call__(self, model: PreTrainedModel, batch: PackedBatch, *, self_certainty: bool = False) -> TokenLogProbs:
        """Log-probs [T] of the response tokens of one input, with gradient."""
        device = next(model.parameters()).device
        batch = batch.to(device)
        ids, line, column, targets = batch.ids, batch.line, batch.column, batch.targets
        if not self.has_plain_head:
            with self._autocast(device):
                logits = plain_logits(model, ids, **batch.options(model))[line, column]
            return self._from_logits(logits, targets, self_certainty)

        def by_head() -> TokenLogProbs:
            with self._autocast(device):
                hidden = plain_hidden(model.get_decoder(), ids, **batch.options(model))[line, column]
            return self._from_hidden(hidden.to(self.dtype), model.get_output_embeddings(), targets, self_certainty)

        return run_whole(model, by_head)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Forward passes in `dtype`."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(device.type, self.dtype)

    def _from_hidden(
        self, hidden: torch.Tensor, head: torch.nn.Module | None, targets: torch.Tensor, self_certainty: bool
    ) -> TokenLogProbs:
        """Log-probs from hidden states [T, D]; logits are fp32 whether they are materialised or not."""
        assert isinstance(head, torch.nn.Linear)
        weight = head.weight.to(hidden.dtype)
        if 4 * len(hidden) * head.out_features <= MAX_LOGITS_BYTES:
            bias = None if head.bias is None else head.bias.float()
            return self._from_logits(linear(hidden.float(), weight.float(), bias), targets, self_certainty)
        found = K.linear_token_logprob(
            hidden,
            weight,
            targets,
            bias=head.bias,
            temperature=self.temperature,
            self_certainty=self_certainty,
            backend=self.backend,
        )
        return TokenLogProbs(found.logprob, found.entropy, found.self_certainty)

    def _from_logits(self, logits: torch.Tensor, targets: torch.Tensor, self_certainty: bool) -> TokenLogProbs:
        """Log-probs from materialised logits [T, V]."""
        found = K.token_logprob(
            logits, targets, temperature=self.temperature, self_certainty=self_certainty, backend=self.backend
        )
        return TokenLogProbs(found.logprob, found.entropy, found.self_certainty)


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are the output embedding of the last hidden state and nothing else (no scale, no softcap).

    A trial replaces what decoder and head return, and follows it; so weights and rounding do not matter.
    """
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    if not isinstance(head, torch.nn.Linear) or decoder is None or decoder is model:
        return False
    ids = torch.arange(4, device=head.weight.device)[None] % head.out_features
    found: dict[str, torch.Tensor] = {}

    def replace_hidden(_module: object, _inputs: object, output: object) -> None:
        if isinstance(output, ModelOutput) and "last_hidden_state" in output:
            found["decoded"] = output["last_hidden_state"]
            output["last_hidden_state"] = found["hidden"] = _ramp(found["decoded"], 1.0)

    def replace_logits(_module: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        found["input"], found["head"] = inputs[0], _ramp(output, 100.0)
        return found["head"]

    hooks = [decoder.register_forward_hook(replace_hidden), head.register_forward_hook(replace_logits)]
    try:
        logits = plain_logits(model, ids)
    except Exception:  # the first pass over trajectories reports it
        return False
    finally:
        for hook in hooks:
            hook.remove()
    if not found.keys() >= {"hidden", "head"}:
        return False
    try:
        alone = run_whole(model, lambda: plain_hidden(decoder, ids))
    except Exception:  # of a decoder that needs more than token ids
        return False
    return (
        torch.equal(found["decoded"], alone)
        and torch.equal(found["hidden"].to(found["input"].dtype), found["input"])
        and torch.equal(found["head"].float(), logits.float())
    )


def _ramp(like: torch.Tensor, most: float) -> torch.Tensor:
    """Values from -most to most in the shape of a tensor."""
    return torch.linspace(-most, most, like.numel(), device=like.device).view(like.shape).to(like.dtype)
