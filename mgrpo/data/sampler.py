"""Draws prompts in a reproducible order."""

from __future__ import annotations

import hashlib
import itertools

import torch

from mgrpo.errors import InputError

PARAMETERS = ("num_prompts", "batch_size", "seed")  # of the order


class Sampler:
    """Endless batches of prompt indices: each epoch is a `torch.randperm` seeded by seed and epoch.

    A batch may span two epochs. A prompt of the new epoch that is already in the batch is moved behind the batch's end,
    so that no prompt is twice in a batch and every epoch is a permutation.
    """

    def __init__(self, num_prompts: int, batch_size: int, seed: int):
        if not 1 <= batch_size <= num_prompts:
            raise InputError(
                f"Sampler: batch_size must be from 1 to the number of prompts ({num_prompts}), got {batch_size}. "
                "Set another --rollout.num-prompts or add data."
            )
        self.num_prompts, self.batch_size, self.seed = num_prompts, batch_size, seed
        self._rewind()

    def _rewind(self) -> None:
        self._num_batches, self._epoch, self._position = 0, 0, 0
        self._order = self._shuffle(0)

    def _shuffle(self, epoch: int) -> list[int]:
        """Draws the order of an epoch."""
        # A hash, because seed + epoch would give neighbouring seeds the same orders.
        digest = hashlib.sha256(f"{self.seed}:{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        return torch.randperm(self.num_prompts, generator=generator).tolist()

    def next(self) -> list[int]:
        """Returns the next `batch_size` indices, all different."""
        batch = self._order[self._position : self._position + self.batch_size]
        self._position += len(batch)
        num_missing = self.batch_size - len(batch)
        if num_missing:
            self._epoch += 1
            order, held = self._shuffle(self._epoch), set(batch)
            head = list(itertools.islice((i for i in order if i not in held), num_missing))
            drawn = set(head)
            self._order = head + [i for i in order if i not in drawn]
            self._position = num_missing
            batch += head
        self._num_batches += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Returns the number of batches drawn and the parameters of the order."""
        return {"num_batches": self._num_batches} | {name: getattr(self, name) for name in PARAMETERS}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores `state` by drawing its batches again.

        Raises:
            InputError: the state has another number of prompts, batch size or seed.

        """
        remedy = "Resume with the data, --rollout.num-prompts and --seed of the run."
        for name in PARAMETERS:
            if state.get(name) != getattr(self, name):
                raise InputError(
                    f"Sampler: {name} of the state must be {getattr(self, name)}, got {state.get(name)}. {remedy}"
                )
        num_batches = state.get("num_batches")
        if not isinstance(num_batches, int) or num_batches < 0:
            raise InputError(f"Sampler: num_batches of the state must be 0 or more, got {num_batches!r}. {remedy}")
        self._rewind()
        for _ in range(num_batches):
            self.next()
