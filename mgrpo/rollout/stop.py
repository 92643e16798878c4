"""Texts at which a response ends, beside EOS: where they are seen, and what is read of such a response.

They are looked for in decoded text, because one may begin and end in the middle of a token.
Letters: R rows, L response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mgrpo.data.template import PLACEHOLDER
from mgrpo.errors import InputError
from mgrpo.grading.thoughts import decode_responses

# Tokens of a row that are decoded to look for a text, more where they are too short for it.
TAIL = 16
# Characters at the start of a decoded tail that may be other than in the whole: part of one, or a space that is lost.
FRAYED = 8
MAX_LABEL = 40
UNDECODED = "\ufffd"


class StopTexts:
    r"""The first of `texts` ends a response. The token that completes it is the response's last.

    Args:
        texts: none empty. One that is a special token, such as <|im_end|>, is met as that token.
        tokenizer: a transformers tokenizer.

    Raises:
        InputError: a special token stands beside other text, where no decoded text has it.
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
        self._pieces: dict[int, str | None] = {}  # of the tokens seen so far; None where one completes no text

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
        """What stands before the text that ended a response; all of one that ended otherwise."""
        found = [(start + len(stop), start) for stop in self.texts if (start := text.find(stop)) >= 0]
        return text[: min(found)[1]] if found else text

    def _piece(self, token: int) -> str | None:
        """Text of a token alone; None of one that can not complete a text."""
        if token not in self._pieces:
            piece = self.tokenizer.decode([token], skip_special_tokens=True)
            # A part of a character, or a space that is lost at the start, tells nothing alone.
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
    r"""The texts of --rollout.stop, with newlines for the two characters `\n`; what the template says where None.

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
    r"""The label of a template's prompt on a line of its own: "\nQuestion:" of 'Question: {prompt}\nAnswer:'.

    It is what a base model goes on with once it has answered. None where no short line, or start of one, that ends in
    a colon stands ahead of the prompt: anything else may be part of an answer.
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
    """Text of each response for an answer to be read from: without special tokens, and without what ended it.

    Marks of a thought stay, and one that the prompt ends with comes first: see `decode_responses`.
    """
    texts = decode_responses(tokenizer, prompts or [()] * len(responses), responses)
    return texts if stop is None else [stop.cut(text) for text in texts]


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Tokens that decoding for answers leaves out."""
    return {added.content: i for i, added in tokenizer.added_tokens_decoder.items() if added.special and added.content}
