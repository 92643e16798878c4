"""Renders records and encodes them as the model reads them."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mgrpo.data.messages import leave_off_answer
from mgrpo.data.records import Record
from mgrpo.data.template import check_template, read_arguments, render
from mgrpo.errors import InputError
from mgrpo.grading.label_text import Label

# The most prompts and characters of one call of the tokenizer.
ENCODE_CHUNK = 1024
ENCODE_CHARS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt; `text` is rendered and `index` is its position in the data set."""

    ids: tuple[int, ...]
    text: str
    answer: Label | None
    index: int


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Prompts in order, the number dropped as too long, and the SHA-256 of the token ids (not of the answers).

    `num_answered` counts conversations whose last turns, the assistant's, were left off; `unread` lists labels without
    an answer, each with its origin.
    """

    prompts: tuple[Prompt, ...]
    num_overlong: int
    fingerprint: str
    num_answered: int = 0
    unread: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)


def make_dataset(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    template: str | None,
    max_prompt_tokens: int,
    overlong: str = "error",
    source: str = "data",
    template_args: Sequence[str] = (),
) -> Dataset:
    r"""Renders the records through the template and encodes them; no prompt is ever truncated.

    The assistant's turns at the end of a conversation, which hold the answer, are left off.

    Args:
        records: from `read_records`; each is released once it is encoded.
        tokenizer: a transformers tokenizer.
        template: None uses text unchanged; "chat" applies the tokenizer's chat template, as chat messages always do;
            any other string contains `{prompt}` once, and the two characters `\n` in it mean a newline.
        max_prompt_tokens: longest prompt that fits, 1 or more.
        overlong: "error" refuses longer prompts, "drop" leaves them out and counts them.
        source: name of the data in messages.
        template_args: arguments of the chat template, each `KEY=VALUE`.

    Returns:
        At least one prompt. Each takes its text, 8 bytes a token and about 300 bytes more in memory; an end-of-text
        token that the tokenizer appends is left off.

    Raises:
        InputError: the template does not fit the tokenizer or the records, a prompt has no tokens, or is too long.
        ValueError: `overlong` is neither "error" nor "drop".
    """
    _check_limits(overlong, max_prompt_tokens, source)
    template = check_template(template, source)
    arguments = read_arguments(template_args, tokenizer, source)
    prompts, unread, digest = list[Prompt](), list[str](), hashlib.sha256()
    num_overlong, first_overlong, num_answered = 0, "", 0
    shared: dict[int, int] = {}  # one int object a token id, so that a prompt takes 8 bytes a token
    rendered = ((record, *render(record, tokenizer, template, arguments)) for record in map(_leave_off, records))
    for record, text, ids in _encode(rendered, tokenizer):
        if not ids:
            raise InputError(f"{source}: {record.origin}: prompt must have tokens, got none. Correct the record.")
        if len(ids) > max_prompt_tokens:
            num_overlong += 1
            first_overlong = first_overlong or f"{record.origin} with {len(ids)}"
            continue
        digest.update(struct.pack(f"<{len(ids) + 1}q", len(ids), *ids))
        ids = tuple(map(shared.setdefault, ids, ids))
        prompts.append(Prompt(ids=ids, text=text, answer=record.label, index=len(prompts)))
        num_answered += record.answered
        unread += [f"{record.origin}: {record.unread!r:.80}"] if record.unread is not None else []
    if not prompts or (num_overlong and overlong == "error"):
        raise _unusable(len(prompts), num_overlong, first_overlong, max_prompt_tokens, source)
    return Dataset(
        prompts=tuple(prompts),
        num_overlong=num_overlong,
        fingerprint=digest.hexdigest(),
        num_answered=num_answered,
        unread=tuple(unread),
    )


def _check_limits(overlong: str, max_prompt_tokens: int, source: str) -> None:
    """Raises ValueError or InputError for options out of range."""
    if overlong not in ("error", "drop"):
        raise ValueError(f"{source}: overlong must be 'error' or 'drop', got {overlong!r}. Choose one.")
    if max_prompt_tokens < 1:
        raise InputError(
            f"{source}: max_prompt_tokens must be at least 1, got {max_prompt_tokens}. "
            "Set a smaller --rollout.max-new-tokens."
        )


def _unusable(num_prompts: int, num_overlong: int, first: str, max_prompt_tokens: int, source: str) -> InputError:
    """The error for prompts that are too long, or for no prompts."""
    if not num_overlong:
        return InputError(f"{source}: data set must hold at least one record, got none. Add records.")
    return InputError(
        f"{source}: prompts must have at most {max_prompt_tokens} tokens, got {num_overlong} of "
        f"{num_prompts + num_overlong} longer ones, the first {first}. "
        f"Set {'--data.overlong drop or ' if num_prompts else ''}a smaller --rollout.max-new-tokens."
    )


def _leave_off(record: Record) -> Record:
    """The record without the assistant's turns at its end."""
    if isinstance(record.prompt, str):
        return record
    messages = leave_off_answer(record.prompt, record.origin)
    return record if messages is record.prompt else replace(record, prompt=messages, answered=True)


def _encode(rendered: Iterable[tuple[Record, str, bool]], tokenizer: Any) -> Iterator[tuple[Record, str, list[int]]]:
    """Encodes texts in order; texts of a chat template already have special tokens and get no more."""
    full, bare = tokenizer("0").input_ids, tokenizer("0", add_special_tokens=False).input_ids
    eos = [tokenizer.eos_token_id]
    appends_eos = full[-1:] == eos and bare[-1:] != eos
    for is_chat, run in itertools.groupby(rendered, key=lambda item: item[2]):
        while chunk := list(_take(run)):
            rows = tokenizer([text for _, text, _ in chunk], add_special_tokens=not is_chat, verbose=False).input_ids
            for (record, text, _), row in zip(chunk, rows, strict=True):
                yield record, text, row[:-1] if appends_eos and not is_chat else row


def _take(rendered: Iterator[tuple[Record, str, bool]]) -> Iterator[tuple[Record, str, bool]]:
    """The prompts of one call of the tokenizer."""
    num_chars = 0
    for item in itertools.islice(rendered, ENCODE_CHUNK):
        yield item
        num_chars += len(item[1])
        if num_chars > ENCODE_CHARS:
            return
