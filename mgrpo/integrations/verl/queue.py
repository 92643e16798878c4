"""Trajectories in verl's queue: reads the columns for the vote and writes its results.

Letters: R rows (trajectories) of a batch, padding rows included; L response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transfer_queue as tq  # pyright: ignore[reportMissingImports]
from tensordict import TensorDict  # pyright: ignore[reportMissingImports]
from verl.workers.utils.padding import response_to_nested  # pyright: ignore[reportMissingImports]

from mgrpo.grading.thoughts import decode_responses
from mgrpo.integrations.verl.groups import GroupCredit, Rows, place_rewards

FIELDS = ("prompts", "responses", "response_mask", "entropy", "reward_model")


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A batch of verl's queue; its padding rows take no part in a vote."""

    batch: Any  # KVBatchMeta
    real: list[int]  # indices of the trajectories, without padding rows
    rows: Rows  # the trajectories for the vote
    mask: torch.Tensor  # [R, L] bool, tokens that the model wrote
    nested_mask: torch.Tensor  # [R, length of each], as in the queue

    def write_rewards(self, credit: GroupCredit) -> None:
        """Writes rewards at the last token, and masks that exclude trajectories not in the loss.

        verl takes the tokens of the loss from `response_mask`, and their number from `loss_mask`.
        """
        mask = self.mask & self._spread(credit.trains)[:, None]
        masks = mask.to(self.nested_mask.dtype)
        self._put(
            rm_scores=place_rewards(self._spread(credit.rewards), self.mask), response_mask=masks, loss_mask=masks
        )

    def write_advantages(self, credit: GroupCredit) -> None:
        """Writes advantages at every token of a trajectory in the loss."""
        advantages = self._spread(credit.advantage)[:, None] * (self.mask & self._spread(credit.trains)[:, None])
        self._put(advantages=advantages, returns=advantages)

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """[R] from the values of the trajectories, which come first; 0 for the others."""
        out = values.new_zeros(len(self.batch.keys))
        out[self.real] = values[: len(self.real)]
        return out

    def _put(self, **fields: torch.Tensor) -> None:
        """Writes fields [R, L]."""
        nested = {name: response_to_nested(values, self.nested_mask) for name, values in fields.items()}
        tq.kv_batch_put(
            keys=self.batch.keys,
            partition_id=self.batch.partition_id,
            fields=TensorDict(nested, batch_size=len(self.batch.keys)),
        )


def fetch(batch: Any, tokenizer: Any, max_length: int) -> Fetched:
    """Reads trajectories with log-probs.

    Args:
        batch: KVBatchMeta, whose trajectories have entropies.
        tokenizer: of the policy.
        max_length: length limit of responses in tokens.
    """
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(FIELDS))
    real = [row for row, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
    prompts, responses = ([ids.tolist() for ids in data[name].unbind()] for name in ("prompts", "responses"))
    labels, nested_mask = data.get("reward_model", None), data["response_mask"]
    labels = [None] * len(responses) if labels is None else labels.tolist()
    cut = [len(ids) >= max_length and ids[-1:] != [tokenizer.eos_token_id] for ids in responses]
    mask = torch.nested.to_padded_tensor(nested_mask, padding=0).bool()
    rows = Rows(
        keys=[batch.keys[row] for row in real],
        texts=decode_responses(tokenizer, [prompts[row] for row in real], [responses[row] for row in real]),
        entropy=torch.nested.to_padded_tensor(data["entropy"].float(), padding=0.0)[real],
        mask=mask[real],
        truncated=torch.tensor(cut, dtype=torch.bool)[real],
        true_answers=[_true_answer(labels[row]) for row in real],
    )
    return Fetched(batch=batch, real=real, rows=rows, mask=mask, nested_mask=nested_mask)


def _true_answer(reward_model: Any) -> Any:
    """The label in the column `reward_model` of verl's data."""
    return reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
