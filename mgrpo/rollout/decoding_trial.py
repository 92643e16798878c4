"""Chooses a model's way of decoding: the first whose logits equal those of the plain forward pass in a trial.

Letters: R sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from mgrpo.errors import EngineError, whole
from mgrpo.models.plain import plain_logits
from mgrpo.rollout.decoding import WAYS, Decoding
from mgrpo.rollout.parity import BOUNDS

# Relative to the spread of the logits. Another order of fp32 sums changes them by 1e-6, in deep models by 1e-5; a wrong
# position or another row's state by 1e-2 and more, even with fresh weights, whose logits are nearly flat.
TOLERANCE = 1e-3
# Share of the parity bound that rounded weights may use up, in the expected change of a sampled token's log-prob.
CAST_SHARE = 0.3
PROMPT_LENGTHS = (5, 8)
# Sequences a prompt; two of them leave the batch before the others.
NUM_SEQUENCES, NUM_TOKENS, ENDING, ENDED_AFTER = 2, 5, (0, 2), 2


class Trial:
    """A few sequences of random tokens, and their logits by the plain forward pass and by decoding."""

    def __init__(self, model: PreTrainedModel, pad_id: int):
        config = model.config.to_dict() | model.config.get_text_config().to_dict()
        special = {value for name, value in config.items() if name.endswith(("token_id", "token_index"))} | {pad_id}
        vocabulary = model.get_input_embeddings().weight.shape[0]  # pyright: ignore
        ids = torch.tensor([i for i in range(min(vocabulary, 10_000)) if i not in special] or [0])
        generator = torch.Generator().manual_seed(0)

        def draw(length: int) -> list[int]:
            return ids[torch.randint(len(ids), (length,), generator=generator)].tolist()

        self.pad_id, self.device = pad_id, next(model.parameters()).device
        self.prompts = [draw(length) for length in PROMPT_LENGTHS]
        self.responses = [draw(NUM_TOKENS) for _ in range(NUM_SEQUENCES * len(self.prompts))]
        self.sequences = [
            torch.tensor([*self.prompts[row // NUM_SEQUENCES], *response])
            for row, response in enumerate(self.responses)
        ]

    def plain(self, model: PreTrainedModel, *, without: int = 0) -> list[torch.Tensor]:
        """Logits [L, V] of each sequence alone, `without` its last tokens."""
        return [
            plain_logits(model, ids[: len(ids) - without][None].to(self.device))[0].clone() for ids in self.sequences
        ]

    def padded(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """Logits [L, V] of each sequence as they are trained on, padded on the right."""
        ids = pad_sequence(self.sequences, batch_first=True, padding_value=self.pad_id)
        logits = plain_logits(model, ids.to(self.device))
        return [logits[row, : len(sequence)] for row, sequence in enumerate(self.sequences)]

    def decode(self, model: PreTrainedModel, way: type[Decoding]) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yields sequence, position and logits [V] of every step of decoding."""
        together = [range(len(self.prompts))]
        if way.equal_lengths:
            together = [range(b, b + 1) for b in range(len(self.prompts))]
        for chosen in together:
            batch = way(model, [self.prompts[b] for b in chosen], NUM_SEQUENCES, self.pad_id)
            rows = [b * NUM_SEQUENCES + i for b in chosen for i in range(NUM_SEQUENCES)]
            for t in range(NUM_TOKENS):
                for logits, row in zip(batch.logits, rows, strict=True):
                    yield row, len(self.sequences[row]) - NUM_TOKENS - 1 + t, logits
                if way.drops_rows and t == ENDED_AFTER:
                    left = [i for i, row in enumerate(rows) if row not in ENDING]
                    batch.keep(torch.tensor(left, device=self.device))
                    rows = [rows[i] for i in left]
                batch.advance(torch.tensor([self.responses[row][t] for row in rows], device=self.device))


@torch.inference_mode()
def choose_way(model: PreTrainedModel, pad_id: int) -> type[Decoding]:
    """The fastest way of decoding that gives the right logits of a model in fp32 and evaluation mode.

    Raises:
        EngineError: the model's logits depend on later tokens, or need more than token ids.
    """
    name, trial = type(model).__name__, Trial(model, pad_id)
    versions = [p._version for p in model.parameters()]
    with _plain(name):
        expected, padded, shorter = trial.plain(model), trial.padded(model), trial.plain(model, without=2)
    if versions != [p._version for p in model.parameters()]:
        raise EngineError(f"model: {name} must not write its weights in a forward pass, it does.")
    gap = max(
        max(_gap(together, alone), _gap(start, alone[: len(start)]))
        for alone, together, start in zip(expected, padded, shorter, strict=True)
    )
    if not gap <= TOLERANCE:
        raise EngineError(
            f"model: {name} must be causal, its logits depend on later tokens by {gap:.2g} of their size. A BERT needs "
            "is_decoder: true in its config.json, and to have been trained so."
        )

    def is_right(way: type[Decoding]) -> bool:
        # A model that lacks what a way needs may raise anything.
        with contextlib.suppress(Exception):
            found = trial.decode(model, way)
            return all(_gap(logits, expected[row][position]) <= TOLERANCE for row, position, logits in found)
        return False

    return next((way for way in WAYS[:-1] if is_right(way)), WAYS[-1])


@torch.inference_mode()
def trial_logprobs(model: PreTrainedModel, pad_id: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Log-probs [L, V] of the trial's sequences in training's mixed precision."""
    trial = Trial(model, pad_id)
    with _plain(type(model).__name__), torch.autocast(trial.device.type, dtype):
        return [torch.log_softmax(logits.float(), -1) for logits in trial.plain(model)]


@torch.inference_mode()
def tolerates_cast(
    model: PreTrainedModel, way: type[Decoding], pad_id: int, dtype: torch.dtype, expected: list[torch.Tensor]
) -> bool:
    """Whether a model with weights cast to `dtype` decodes to `expected`, the result of `trial_logprobs` before."""
    trial, gaps = Trial(model, pad_id), []
    with contextlib.suppress(Exception):  # layers that mix dtypes raise
        for row, position, logits in trial.decode(model, way):
            right = expected[row][position]
            gaps.append((right.exp() * (torch.log_softmax(logits.float(), -1) - right).nan_to_num().abs()).sum())
        return bool(torch.stack(gaps).mean() <= CAST_SHARE * BOUNDS[dtype])
    return False


@contextlib.contextmanager
def _plain(name: str) -> Iterator[None]:
    """Turns whatever a plain forward pass raises into EngineError."""
    try:
        yield
    except Exception as error:
        raise EngineError(f"model: {name} must give logits for token ids alone, got {whole(error)}.") from error


def _gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Difference of logits, as a share of their spread."""
    found, expected = found.double(), expected.double()
    difference = torch.where(found == expected, 0, found - expected)
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    return float(difference.norm() / spread.clamp_min(1e-30))
