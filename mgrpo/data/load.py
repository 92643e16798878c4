"""Loads the prompts of a configuration as token ids and checks them against the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sized
from dataclasses import replace

from mgrpo.algorithm.reward import needs_labels
from mgrpo.config import AnswerConfig, Config, DataConfig
from mgrpo.data.prompts import Dataset, make_dataset
from mgrpo.data.records import Record, read_records
from mgrpo.errors import InputError
from mgrpo.grading.canonical import canonicalize
from mgrpo.grading.label_text import Label
from mgrpo.grading.labels import MAX_PLAIN_CHARS, make_label_reader
from mgrpo.models.load import LoadedModel, num_embeddings
from mgrpo.models.tokenizer import Tokenizer
from mgrpo.presets import PRESETS

SHOWN_LABELS = 3
MANY_WORDS = 6  # of an answer
# Labels that may be meant differently: pattern, description, least share of all labels that is reported, remedy.
_DOUBTFUL = (
    (re.compile(r"nan|null|<na>|n/a|#n/a", re.I), "look like missing ones", 0, "leave them empty."),
    (
        re.compile(r"[+-]?\d+,(?:\d{1,2}|\d{4,})"),
        "look like decimal numbers with a comma",
        0.1,
        "write them with a point, or they are compared as lists.",
    ),
    (re.compile(r"""\{\s*["']\w+["']\s*:.*\}""", re.DOTALL), "are objects", 0, "name the key inside, as in a.b."),
)


def load_prompts(config: Config, loaded: LoadedModel | Tokenizer, source: str) -> Dataset:
    """Loads `source` with the options of `config`; every prompt leaves room for a response of full length."""
    room = loaded.context_length - config.rollout.max_new_tokens
    if room < 1:
        raise InputError(
            f"data: --rollout.max-new-tokens must be below the model's context of {loaded.context_length} tokens, "
            f"got {config.rollout.max_new_tokens}."
        )
    need_answer = needs_answers(config, source)
    return load_dataset(source, config.data, config.answer, loaded, max_prompt_tokens=room, need_answer=need_answer)


def load_dataset(
    source: str,
    data: DataConfig,
    answer: AnswerConfig,
    loaded: LoadedModel | Tokenizer,
    *,
    max_prompt_tokens: int,
    need_answer: bool,
    limit: int | None = None,
) -> Dataset:
    """Loads the first `limit` records of `source` as prompts; raises InputError for data that does not fit the model.

    Args:
        source: as in `read_records`.
        data, answer: options of the data and of its labels.
        loaded: the tokenizer, and the model if its embedding is to be checked.
        max_prompt_tokens: longest prompt that fits.
        need_answer: whether an answer key that no record has is an error.
        limit: None takes all records. The whole source is read in any case.
    """
    records = read_source(source, data, need_answer=need_answer)
    dataset = make_dataset(
        read_answers(records if limit is None else list(records)[:limit], answers_of(source, answer)),
        loaded.tokenizer,
        template=data.template,
        max_prompt_tokens=max_prompt_tokens,
        overlong=data.overlong,
        source=source,
        template_args=data.template_args,
    )
    if isinstance(loaded, LoadedModel):
        _require_embedded(dataset, loaded, source)
    return dataset


def read_source(source: str, data: DataConfig, *, need_answer: bool) -> Iterator[Record]:
    """The records of a source; see `load_dataset`."""
    key = data.answer_key or "answer"
    return read_records(source, prompt_key=data.prompt_key, answer_key=key, split=data.split, need_answer=need_answer)


def check_records(source: str, data: DataConfig, answer: AnswerConfig, *, need_answer: bool) -> list[Record]:
    """The records with their answers; raises InputError for what is wrong with them for any model."""
    return list(read_answers(read_source(source, data, need_answer=need_answer), answers_of(source, answer)))


def _require_embedded(data: Dataset, loaded: LoadedModel, source: str) -> None:
    """Raises InputError for the first prompt with a token beyond the rows of the model's embedding."""
    rows = num_embeddings(loaded.model)
    if rows is None:
        return
    for prompt in data.prompts:
        if (largest := max(prompt.ids)) >= rows:
            raise InputError(
                f"{source}: tokens must be below {rows}, the rows of the model's embedding, prompt {prompt.index + 1} "
                f"has {largest}: {prompt.text!r:.60}. Resize the embedding or use the model's own tokenizer."
            )


def require_prompts(data: Sized, config: Config) -> None:
    """Raises InputError if a step needs more prompts than there are."""
    if len(data) < config.rollout.num_prompts:
        raise InputError(
            f"data: --rollout.num-prompts must be at most the {len(data)} prompts of the data, "
            f"got {config.rollout.num_prompts}. Set another --rollout.num-prompts or add data."
        )


def needs_answers(config: Config, source: str) -> bool:
    """Whether the answer key must be in the data: the answers are used, or the user gave the key for them."""
    data = config.data
    if source == data.probe or needs_labels(config.objective.reward):
        return True
    usual = PRESETS[config.preset]().data if config.preset in PRESETS else DataConfig()
    # The key may belong to the eval set alone, which reports a wrong one. A resumed run was checked at its start.
    is_of_eval = data.probe is not None and not data.probe.startswith("arithmetic:")
    return data.answer_key not in (None, usual.answer_key) and not is_of_eval and not config.resume


def answers_of(source: str, config: AnswerConfig) -> AnswerConfig:
    """The answer options of a source; labels of the built-in problems are always bare numbers."""
    make_label_reader(config.label_extract)  # raises for an invalid spec in any case
    return replace(config, label_extract="plain") if source.startswith("arithmetic:") else config


def read_answers(records: Iterable[Record], config: AnswerConfig) -> Iterator[Record]:
    """Extracts the true answer of each label by `config.label_extract`.

    Raises:
        InputError: an unknown format, or with `auto` a long label without a marked answer.

    """
    read = make_label_reader(config.label_extract)
    for record in records:
        answer = read(record.label)
        if answer is None and record.answer is not None:
            if config.label_extract == "auto":
                raise InputError(_describe_long(record))
            record = replace(record, unread=record.label)
        yield record if answer == record.answer and not record.others else replace(record, answer=answer, others=())


def _describe_long(record: Record) -> str:
    """The error for a label that is a solution without a marked answer."""
    label = record.label or ""
    labels = [label] if isinstance(label, str) else label
    longest = max(labels, key=len)
    return (
        f"{record.origin}: label must mark its answer by a box or a #### line, or have at most {MAX_PLAIN_CHARS} "
        f"characters, got {len(longest)}: {longest[:60]!r} ... {longest[-20:]!r}. Set --answer.label-extract "
        "last-number or regex:PATTERN, or plain to compare whole labels, or name another "
        "--data.answer-key."
    )


def require_answers(data: Dataset, what: str) -> None:
    """Raises InputError unless every prompt has a true answer."""
    missing = sum(prompt.answer is None for prompt in data.prompts)
    if missing:
        message = f"data: {what} needs the true answer of every prompt, {missing} of {len(data)} have none."
        if data.unread:
            message += f" {describe_unread(data)} Set another --answer.label-extract."
        raise InputError(message)


def describe_unread(data: Dataset) -> str:
    """A sentence on the labels in which no answer was found."""
    return f"No answer was found in {len(data.unread):,} labels, the first {data.unread[0]}."


def describe_labels(data: Dataset) -> str:
    """The number of prompts with a label, and the first labels in their compared form."""
    known = [prompt.answer for prompt in data.prompts if prompt.answer is not None]
    shown = " | ".join(f"{_canonical(label):.60}" for label in known[:SHOWN_LABELS])
    return f"{len(known):,} of {len(data):,} prompts" + (f", the first compared as {shown}" if known else "")


def describe_data(data: Dataset) -> list[str]:
    """Sentences on parts of the data that were left out and on labels that look wrong."""
    notes = []
    if data.num_answered:
        notes.append(f"The assistant's turn at the end of {data.num_answered:,} prompts was left off; it is no label.")
    if data.unread:
        notes.append(describe_unread(data))
    labels = [prompt.answer for prompt in data.prompts if isinstance(prompt.answer, str)]
    wordy = [label for label in labels if len(label.split()) >= MANY_WORDS]
    if wordy:
        notes.append(
            f"{len(wordy):,} labels have {MANY_WORDS} words or more, such as {wordy[0]!r:.80}: "
            "if the answer is inside, set --answer.label-extract."
        )
    notes += [
        f"{len(found):,} labels {what}, such as {found[0]!r:.80}: {remedy}"
        for pattern, what, share, remedy in _DOUBTFUL
        if (found := [label for label in labels if pattern.fullmatch(label.strip())])
        and len(found) >= share * len(labels)
    ]
    return notes


def _canonical(label: Label) -> str:
    """A label in its compared form."""
    return canonicalize(label) if isinstance(label, str) else " or ".join(map(canonicalize, label))
