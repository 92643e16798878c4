"""Ways of decoding: the next token's logits of growing sequences, with the cache that a model supports.

Letters: B prompts, n sequences a prompt, R = B * n sequences in the batch, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from mgrpo.models.plain import accepted, plain_logits

# Names under which models return their state and take it back.
STATES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")


class Decoding(ABC):
    """A batch of n sequences of each prompt; `logits` [R, V] are those of the next token."""

    equal_lengths: ClassVar[bool]  # whether the prompts of a batch must have one length
    drops_rows: ClassVar[bool]  # whether `keep` works
    logits: torch.Tensor

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], n: int, pad_id: int):
        self.model, self.device = model, next(model.parameters()).device
        self.start(prompts, n, pad_id)

    @abstractmethod
    def start(self, prompts: Sequence[Sequence[int]], n: int, pad_id: int) -> None:
        """Reads the prompts."""

    @abstractmethod
    def advance(self, token: torch.Tensor) -> None:
        """Appends a token [R] to every sequence."""

    def keep(self, rows: torch.Tensor) -> None:
        """Removes all but `rows` [r] from the batch."""
        raise NotImplementedError

    def accepted(self, **options: Any) -> dict[str, Any]:
        """The options that the model's forward pass takes."""
        return {name: value for name, value in options.items() if name in accepted(self.model)}


class Padded(Decoding):
    """Prompts padded on the left, read once each; rows of the cache are repeated, and dropped where they end."""

    equal_lengths, drops_rows = False, True

    def start(self, prompts: Sequence[Sequence[int]], n: int, pad_id: int) -> None:
        """Reads each prompt once and repeats its rows."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), pad_id)
        attention = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attention[row, width - len(prompt) :] = 1
        ids, attention = ids.to(self.device), attention.to(self.device)
        self.cache = DynamicCache(config=self.model.config)
        logits = self._forward(
            ids, attention, (attention.cumsum(1) - 1).clamp_min(0), **self.accepted(logits_to_keep=1)
        )
        self.logits = logits.repeat_interleave(n, 0)
        self.attention = attention.repeat_interleave(n, 0)
        # Layers with a recurrent state move their rows only by beam search's method.
        self.has_states = any(hasattr(layer, "recurrent_states") for layer in self.cache.layers)
        if self.has_states:
            self._reorder(torch.arange(len(prompts), device=self.device).repeat_interleave(n))
        else:
            self.cache.batch_repeat_interleave(n)
        self.position = self.attention.sum(1)

    def advance(self, token: torch.Tensor) -> None:
        """Attends to everything but the padding."""
        self.attention = torch.cat([self.attention, self.attention.new_ones(len(token), 1)], 1)
        self.logits = self._forward(token[:, None], self.attention, self.position[:, None])
        self.position = self.position + 1

    def keep(self, rows: torch.Tensor) -> None:
        """Selects rows of the cache."""
        if self.has_states:
            self._reorder(rows)
        else:
            self.cache.batch_select_indices(rows)
        self.attention, self.position = self.attention[rows], self.position[rows]

    def _forward(
        self, ids: torch.Tensor, attention: torch.Tensor, positions: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Logits [R, V] after the last token."""
        state = next((name for name in STATES if name in accepted(self.model)), "past_key_values")
        options |= self.accepted(position_ids=positions) | {state: self.cache}
        return self.model(input_ids=ids, attention_mask=attention, use_cache=True, **options).logits[:, -1]

    def _reorder(self, rows: torch.Tensor) -> None:
        """Selects rows [r] of the cache, which may repeat."""
        self.cache.reorder_cache(cast(torch.LongTensor, rows))


class Unpadded(Decoding):
    """Prompts of one length, each read n times; the model makes its own state, from which no row can be dropped."""

    equal_lengths, drops_rows = True, False

    def start(self, prompts: Sequence[Sequence[int]], n: int, pad_id: int) -> None:
        """Reads each prompt n times."""
        self.state: dict[str, Any] = {}
        self._forward(torch.tensor([list(prompt) for prompt in prompts], device=self.device).repeat_interleave(n, 0))

    def advance(self, token: torch.Tensor) -> None:
        """Passes the model's state back to it."""
        self._forward(token[:, None])

    def _forward(self, ids: torch.Tensor) -> None:
        out = self.model(input_ids=ids, use_cache=True, **self.state, **self.accepted(logits_to_keep=1))
        self.logits = out.logits[:, -1]
        self.state = {name: out[name] for name in STATES if out.get(name) is not None}


class Recomputed(Decoding):
    """Prompts of one length, and every sequence read from its start for every token."""

    equal_lengths, drops_rows = True, True

    def start(self, prompts: Sequence[Sequence[int]], n: int, pad_id: int) -> None:
        """Reads each prompt n times."""
        self.ids = torch.tensor([list(prompt) for prompt in prompts], device=self.device).repeat_interleave(n, 0)
        self._forward()

    def advance(self, token: torch.Tensor) -> None:
        """Reads everything again."""
        self.ids = torch.cat([self.ids, token[:, None]], 1)
        self._forward()

    def keep(self, rows: torch.Tensor) -> None:
        """Drops the other sequences."""
        self.ids = self.ids[rows]

    def _forward(self) -> None:
        self.logits = plain_logits(self.model, self.ids, last=True)


WAYS: tuple[type[Decoding], ...] = (Padded, Unpadded, Recomputed)
