"""Reads raw records of prompts and answers from files or the hub, or draws them from the built-in task."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgrpo.data.csv_files import read_csv
from mgrpo.data.files import UNREADABLE, format_of, list_files, open_bytes, read_whole
from mgrpo.data.json_files import read_json, read_lines
from mgrpo.data.keys import ABSENT, Keys, look_up, name_keys
from mgrpo.data.messages import Messages, parse_messages, read_messages
from mgrpo.errors import InputError, whole
from mgrpo.grading.label_text import Label, label_text
from mgrpo.inputs import MAX_RECORD_BYTES, Budget, check_unicode, name_type, nearest, too_large

# The id of a data set, optionally with a colon and one of its configurations.
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?::([\w.-]+))?")
# The error of the package datasets where a configuration must be named.
_CONFIGS = re.compile(r"Config name is missing.*?\[([^\]]{1,500})", re.DOTALL)
# Bounded digits, so that a typing error cannot ask for a billion operands.
ARITHMETIC = re.compile(r"arithmetic:([0-9]{1,9}):([0-9]{1,2})(?:-([0-9]{1,2}))?:([0-9]{1,18})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One raw record: text or chat messages, the answer if known, and its origin (counted from 1).

    Of several known answers, any is right: `others` has all but the first until the label is read; then `answer` has
    all. `unread` is a label without an answer. `answered` is True if the assistant's turns at the end were left off.
    """

    prompt: str | Messages
    answer: Label | None
    origin: str
    unread: Label | None = None
    answered: bool = False
    others: tuple[str, ...] = ()

    @property
    def label(self) -> Label | None:
        """The answer, or all of them."""
        return (self.answer, *self.others) if self.others and isinstance(self.answer, str) else self.answer


def load_records(source: str, **options: Any) -> list[Record]:
    """`read_records` as a list."""
    return list(read_records(source, **options))


def read_records(
    source: str,
    *,
    prompt_key: str = "prompt",
    answer_key: str | None = "answer",
    split: str = "train",
    need_answer: bool = False,
) -> Iterator[Record]:
    """Reads the records of a source in order, one at a time.

    Args:
        source: a .jsonl, .json, .parquet, .csv, .tsv or .arrow file, text also as .gz; a folder (every such file in
            it, sorted by name, without hidden files and subfolders; only files of the split if all names are those of
            splits); a folder of `save_to_disk`; `arithmetic:NUM:OPERANDS:SEED` for built-in problems (OPERANDS is `5`
            or `3-7`); or else the id of a hub data set, with `:NAME` if it has several configurations.
        prompt_key: key of the prompt; `a.b` is the key `b` of the object `a`. The built-in problems ignore it.
        answer_key: key of the answer, dotted too; None reads no answers, and a record without the key has none.
        split: split of a hub data set, of a saved DatasetDict, of a folder with files of several splits, or of a .json
            file with a list for each split; other files ignore it.
        need_answer: whether an answer key that no record has is an error.

    Yields:
        At least one record.

    Raises:
        InputError: the source cannot be found or read, is empty, has an invalid record, or exceeds 4 MiB a record,
            1 GiB of text, 10 million records, or 64 MiB of .json, .csv or .tsv, decompressed. Earlier records are
            yielded first.

    """
    if not source.strip():
        raise InputError("data: source must be a file, a folder or a hub data set, got an empty name. Name one.")
    if source.startswith("arithmetic:"):
        yield from _make_arithmetic(source)
        return
    keys, budget = Keys(prompt_key, answer_key), Budget()
    try:
        for where, origin, row in _read_source(source, keys, split, budget):
            budget.spend_record(where)
            yield _make_record(row, keys, where=where, origin=origin)
    except MemoryError as error:
        raise InputError(f"{source}: data must fit into the memory of this machine, got more. Split it.") from error
    if not budget.records_read:
        raise InputError(f"{source}: data set must hold at least one record, got none. Add records or name other data.")
    if need_answer:
        keys.require_answer(source)


def _read_source(source: str, keys: Keys, split: str, budget: Budget) -> Iterator[tuple[str, str, Any]]:
    """Yields the raw rows of files or of a hub data set, each with its place for errors and its origin."""
    if os.path.exists(source):
        for path in list_files(Path(source), split):
            try:
                for position, row in _read_rows(path, keys, split, budget):
                    yield f"{path}{position}", f"{path.name}{position}", row
            except UNREADABLE as error:
                raise InputError(f"{path}: cannot be read: {error}. Check the file and its permissions.") from error
    elif format_of(Path(source)) is None and HUB_ID.fullmatch(source):
        for position, row in _read_hub(source, keys, split, budget):
            yield f"{source}{position}", f"{source}{position}", row
    else:
        raise InputError(f"{source}: no such file or folder.{_suggest_path(source)} Check the path.")


def _read_rows(path: Path, keys: Keys, split: str, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Yields the raw rows of a file, each with its position: `:LINE`, ` row N` or ` record N`."""
    match format_of(path):
        case ".arrow":
            from mgrpo.data.arrow_files import read_arrow

            yield from read_arrow(path, keys, budget)
        case ".parquet":
            from mgrpo.data.tables import read_parquet

            yield from read_parquet(path, keys, budget)
        case kind:
            with open_bytes(path) as file:
                if kind in (".csv", ".tsv"):
                    yield from read_csv(read_whole(file, path, budget), path, keys)
                else:
                    yield from (read_json if kind == ".json" else read_lines)(file, path, keys, split, budget)


def _make_arithmetic(source: str) -> Iterator[Record]:
    """Draws the built-in problems of `arithmetic:NUM:OPERANDS:SEED`."""
    from mgrpo.tasks.arithmetic import make_problems

    match = ARITHMETIC.fullmatch(source)
    if match:
        num, low, high, seed = (int(group) for group in (match[1], match[2], match[3] or match[2], match[4]))
        if num >= 1 and 2 <= low <= high:
            problems = make_problems(num, operands=tuple(range(low, high + 1)), seed=seed)
            return (
                Record(prompt=p.prompt, answer=p.answer, origin=f"arithmetic:{i}") for i, p in enumerate(problems, 1)
            )
    raise InputError(
        f"data: source must be arithmetic:NUM:OPERANDS:SEED with NUM of 1 or more and OPERANDS from 2 to 99, "
        f"got {source!r}. Write for example arithmetic:4096:3-7:0."
    )


def _suggest_path(source: str) -> str:
    """Suggests the entry of the folder that is nearest to a missing path, as a sentence; or an empty string."""
    if "://" in source:
        return " A URL is not read: download the file, or name a hub data set by its id."
    path = Path(source)
    if os.path.islink(path):
        return f" It is a link to {os.readlink(path)}."
    names = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    close = nearest(path.name, names)
    return f" Did you mean {path.parent / close}?" if close else ""


def _read_hub(source: str, keys: Keys, split: str, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Reads the wanted columns of a hub data set, which is on the disk as arrow tables."""
    import datasets

    from mgrpo.data.tables import read_table

    match = HUB_ID.fullmatch(source)
    names = [name for name in match.groups() if name] if match else [source]
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)  # it logs a line for each retry
    try:
        dataset = datasets.load_dataset(*names, split=split)
    except Exception as error:  # the hub client raises its own errors, httpx's, OSError and ValueError
        first = str(error).strip().partition("\n")[0].rstrip()
        reason = whole(error) if not first or first.endswith(":") else first.rstrip(".")
        remedy = "Check the name and the network, or name a local file."
        if configs := _CONFIGS.search(str(error)):
            remedy = f"Name one of the configurations {configs[1]} behind a colon, as {names[0]}:NAME."
        raise InputError(
            f"{source}: neither a path nor a reachable hub data set with split {split!r}: {reason}."
            f"{_suggest_path(source)} {remedy}"
        ) from error
    finally:
        client.setLevel(level)
    yield from read_table(dataset, source, keys, budget)


def _make_record(row: Any, keys: Keys, *, where: str, origin: str) -> Record:
    """Checks one raw row and turns it into a record."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: record must be an object, got {name_type(row)}. Write {{{keys.prompt!r}: ...}}.")
    prompt = look_up(row, keys.prompt)
    if prompt is ABSENT:
        raise keys.no_prompt(name_keys(row), where)
    if not keys.has_answer:
        keys.note(name_keys(row))
    label = label_text(keys.find_answer(row), keys.answer or "", where)
    answer, *others = label if isinstance(label, tuple) else (label,)
    prompt = _check_prompt(prompt, keys.prompt, where)
    return Record(prompt=prompt, answer=answer, origin=origin, others=tuple(others))


def _check_prompt(prompt: Any, key: str, where: str) -> str | Messages:
    """Returns a prompt that is text or chat messages, at least one of them with text."""
    if isinstance(prompt, str):
        prompt = parse_messages(prompt, key, where) or prompt
    if isinstance(prompt, str):
        texts = [prompt]
    elif isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        prompt = read_messages(prompt, key, where)
        texts = [message["content"] for message in prompt]
    else:
        raise InputError(
            f"{where}: {key!r} must be text or a list of chat messages, got {name_type(prompt)}. "
            "Correct the record or name another key with --data.prompt-key."
        )
    if not any(text.strip() for text in texts):
        raise InputError(f"{where}: {key!r} must hold text, got a blank prompt. Remove or complete the record.")
    for text in texts:
        check_unicode(text, repr(key), where)
    if sum(map(len, texts)) > MAX_RECORD_BYTES:
        raise too_large(f"{where}: {key!r}", MAX_RECORD_BYTES)
    return prompt
