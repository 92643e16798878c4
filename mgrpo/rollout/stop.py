"""Stop texts: texts other than EOS that end a response.

They are searched for in decoded text, because one may begin and end in the middle of a token.
Letters: R rows, L response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mgrpo.data.template import PLACEHOLDER
from mgrpo.errors import InputError
from mgrpo.grading.thoughts import decode_responses

# Last tokens of a row that are decoded for the search, more if their text is shorter than a stop text.
TAIL = 16
# Characters at the start of a decoded tail that may differ from the whole text: part of one, or a lost space.
FRAYED = 8
MAX_LABEL = 40
UNDECODED = "\ufffd"


class StopTexts:
    r"""The first of `texts` ends a response. The token that completes it is the response's last.

    Args:
        texts: none empty. One that is a special token, such as <|im_end|>, is found as that token.
        tokenizer: a transformers tokenizer.

    Raises:
        InputError: a text holds a special token beside other text, which decoded text never does.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any):
        self.texts, self.tokenizer = tuple(texts), tokenizer
        special = _special_tokens(tokenizer)
        self.token_ids = tuple(special[text] for text in self.texts if text in special)
        for text in self.texts:
            if text not in special and (held := next((token for token in special if token in text), None)):
                raise InputError(
                    f"rollout: --rollout.stop must be text without special tokens or one of them alone, got {text!r}. "
                    f"Give {held!r}."
                )
        self._longest = max(map(len, self.texts), default=0)
        self._lasts = {text[-1] for text in self.texts}
        self._pieces: dict[int, str | None] = {}  # text of each token seen; None if it completes no stop text

    def ended(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[len(rows)] bool, whether the last token of tokens [R, L] completes a text in each of `rows`, on the host."""
        last = tokens[rows, -1].tolist()
        found = torch.zeros(len(last), dtype=torch.bool)
        for i, token in enumerate(last):
            if self._piece(token) is not None:
                found[i] = self._completes(tokens[rows[i]])
        return found

    def end(self, tokens: Sequence[int]) -> int | None:
        """Number of tokens up to the one that completes a text; None where none does."""
        row = torch.tensor(tokens, dtype=torch.int64)
        ends = (i + 1 for i, token in enumerate(tokens) if self._piece(token) is not None)
        return next((end for end in ends if self._completes(row[:end])), None)

    def cut(self, text: str) -> str:
        """The part of a response before the stop text; all of one without."""
        found = [(start + len(stop), start) for stop in self.texts if (start := text.find(stop)) >= 0]
        return text[: min(found)[1]] if found else text

    def _piece(self, token: int) -> str | None:
        """Text of a token alone; None if the token cannot complete a stop text."""
        if token not in self._pieces:
            piece = self.tokenizer.decode([token], skip_special_tokens=True)
            # Alone, a token may decode to part of a character or lose a space at its start.
            unclear = not piece or UNDECODED in piece or " " in self._lasts
            self._pieces[token] = piece if unclear or any(last in piece for last in self._lasts) else None
        return self._pieces[token]

    def _completes(self, row: torch.Tensor) -> bool:
        """Whether the last token of a row completes a text."""
        reach = self._longest + len(self._piece(int(row[-1])) or "") + 1
        size = TAIL
        while True:
            text = self.tokenizer.decode(row[-size:].tolist(), skip_special_tokens=True)
            if size >= len(row) or len(text) >= reach + FRAYED:
                break
            size *= 4
        return any(stop in text[-reach:] for stop in self.texts)


def make_stop(given: Sequence[str] | None, template: str | None, tokenizer: Any) -> StopTexts | None:
    r"""The texts of --rollout.stop, with newlines for the two characters `\n`; if None, the template's label.

    Raises:
        InputError: a text holds a special token beside other text.
    """
    if given is not None:
        texts = [text.replace("\\n", "\n") for text in given if text]
        return StopTexts(texts, tokenizer) if texts else None
    label = find_label(template)
    if label is None or any(token in label for token in _special_tokens(tokenizer)):
        return None
    return StopTexts([label], tokenizer)


def find_label(template: str | None) -> str | None:
    r"""The label before a template's prompt, with a newline: "\nQuestion:" of 'Question: {prompt}\nAnswer:'.

    A base model continues with it after its answer. None unless the label is short and ends in a colon: anything else
    may be part of an answer.
    """
    before = (template or "").replace("\\n", "\n").partition(PLACEHOLDER)[0].rstrip()
    label = before.rpartition("\n")[2].strip()
    is_label = label.endswith((":", "\uff1a")) and any(map(str.isalnum, label)) and len(label) <= MAX_LABEL
    return "\n" + label if is_label else None


def read_texts(
    tokenizer: Any,
    responses: Sequence[Sequence[int]],
    stop: StopTexts | None,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
) -> list[str]:
    """Text of each response to read an answer from, without special tokens and without the stop text.

    The marks of a thought stay; one that ends the prompt comes first: see `decode_responses`.
    """
    texts = decode_responses(tokenizer, prompts or [()] * len(responses), responses)
    return texts if stop is None else [stop.cut(text) for text in texts]


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Special tokens by text, which decoding leaves out."""
    return {added.content: i for i, added in tokenizer.added_tokens_decoder.items() if added.special and added.content}
