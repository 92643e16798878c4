"""Raw records of prompts and answers: read from files, from the hub, or drawn from the built-in task."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
# What a data set may hold, so that no file can fill the memory: bytes of one record and of all, and their number.
MAX_RECORD_BYTES = 4 << 20
MAX_TEXT_BYTES = 1 << 30
MAX_RECORDS = 10_000_000
# Files that are parsed as a whole may take 25 times their size meanwhile.
MAX_WHOLE_BYTES = 64 << 20
NAMED_KEYS = 20  # in messages
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Bounded digits: a slip of the finger cannot ask for a billion operands.
ARITHMETIC = re.compile(r"arithmetic:([0-9]{1,9}):([0-9]{1,2})(?:-([0-9]{1,2}))?:([0-9]{1,18})")


class InputError(ValueError):
    """Bad input of the user: the message names the file, the line and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One raw record: text or chat messages, the answer if known, and where it was read (counted from 1)."""

    prompt: str | list[dict[str, Any]]
    answer: str | None
    origin: str


class Budget:
    """What may still be read of a source; asking for more raises InputError."""

    def __init__(self) -> None:
        self.num_bytes, self.num_records = MAX_TEXT_BYTES, MAX_RECORDS

    def spend(self, num_bytes: int, where: str) -> None:
        """Takes off the bytes of what is read up to a place."""
        self.num_bytes -= num_bytes
        if self.num_bytes < 0:
            raise _too_large(f"{where}: data up to here", MAX_TEXT_BYTES)

    def expect(self, num_bytes: int, where: str) -> None:
        """Asks for the bytes that a file claims to hold, which are taken off as they are read."""
        if num_bytes > self.num_bytes:
            raise _too_large(f"{where}: data up to the end of the file", MAX_TEXT_BYTES)

    def check_record(self, num_bytes: int, where: str) -> None:
        """Asks for the bytes of one record."""
        if num_bytes > MAX_RECORD_BYTES:
            raise _too_large(f"{where}: record", MAX_RECORD_BYTES)

    def check_records(self, num_records: int, where: str) -> None:
        """Asks for the records that a file claims to hold."""
        if num_records > self.num_records:
            raise InputError(f"{where}: data set must have at most {MAX_RECORDS} records, got more. Split the data.")


def load_records(
    source: str, *, prompt_key: str = "prompt", answer_key: str | None = "answer", split: str = "train"
) -> list[Record]:
    """All records of a source as a list; `read_records` says the rest."""
    return list(read_records(source, prompt_key=prompt_key, answer_key=answer_key, split=split))


def read_records(
    source: str, *, prompt_key: str = "prompt", answer_key: str | None = "answer", split: str = "train"
) -> Iterator[Record]:
    """Reads the records of a source in order, one at a time.

    Args:
        source: a .jsonl, .json, .parquet or .csv file; a folder (every such file in it, sorted by name, hidden files
            and subfolders left out); `arithmetic:NUM:OPERANDS:SEED` for built-in problems (OPERANDS is `5` or `3-7`);
            or else the id of a hub data set.
        prompt_key: key of the prompt; the built-in problems ignore it.
        answer_key: key of the answer; None reads no answers, and a record without the key has none.
        split: split of a hub data set; files ignore it.

    Yields:
        At least one record.

    Raises:
        InputError: the source cannot be found or read, is empty, holds a bad record, or more than 4 MiB a record,
            1 GiB of text, 10 million records, or 64 MiB of .json or .csv. What was read before is yielded.

    """
    if not source.strip():
        raise InputError("data: source must be a file, a folder or a hub data set, got an empty name. Name one.")
    if source.startswith("arithmetic:"):
        yield from _make_arithmetic(source)
        return
    keys = [prompt_key] if answer_key is None else [prompt_key, answer_key]
    budget = Budget()
    try:
        for where, origin, row in _read_source(source, keys, split, budget):
            budget.check_records(1, where)
            budget.num_records -= 1
            yield _make_record(row, keys, where=where, origin=origin)
    except MemoryError as error:
        raise InputError(f"{source}: data must fit into the memory of this machine, got more. Split it.") from error
    if budget.num_records == MAX_RECORDS:
        raise InputError(f"{source}: data set must hold at least one record, got none. Add records or name other data.")


def _read_source(source: str, keys: list[str], split: str, budget: Budget) -> Iterator[tuple[str, str, Any]]:
    """Yields the raw rows of files or of a hub data set, each with its place and its origin."""
    if os.path.exists(source):
        for path in _list_files(Path(source)):
            try:
                for position, row in _read_rows(path, keys, budget):
                    yield f"{path}{position}", f"{path.name}{position}", row
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error}. Check the file and its permissions.") from error
    elif Path(source).suffix.lower() not in SUFFIXES and HUB_ID.fullmatch(source):
        for position, row in _read_hub(source, keys, split, budget):
            yield f"{source}{position}", f"{source}{position}", row
    else:
        raise InputError(f"{source}: no such file or folder.{_suggest_path(source)} Check the path.")


def _make_arithmetic(source: str) -> Iterator[Record]:
    """Draws the built-in problems that `arithmetic:NUM:OPERANDS:SEED` describes."""
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


def _list_files(path: Path) -> list[Path]:
    """Lists the data files that a file or folder stands for."""
    known = ", ".join(SUFFIXES)
    if path.is_dir():
        files = sorted(
            f for f in path.iterdir() if f.is_file() and f.suffix.lower() in SUFFIXES and not f.name.startswith(".")
        )
        if not files:
            raise InputError(f"{path}: folder must hold {known} files, got none. Name the folder that holds the data.")
        return files
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: file name must end in {known}, got {path.suffix!r}. Convert or rename the file.")
    return [path]


def _suggest_path(source: str) -> str:
    """Names the entry of the same folder that is nearest to a missing path, as a sentence, or nothing."""
    path = Path(source)
    names = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def _read_rows(path: Path, keys: list[str], budget: Budget) -> Iterator[tuple[str, Any]]:
    """Yields the raw rows of a file, each with its position: `:LINE`, ` row N` or ` record N`."""
    match path.suffix.lower():
        case ".jsonl":
            return _read_jsonl(path, budget)
        case ".json":
            return _read_json(path, budget)
        case ".csv":
            return _read_csv(path, budget)
        case _:
            return _read_parquet(path, keys, budget)


def _decode(raw: bytes, path: Path, first_line: int = 1) -> str:
    """Decodes UTF-8 with or without a byte order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + error.object.count(b"\n", 0, error.start)
        raise InputError(f"{path}:{line}: not valid UTF-8: {error.reason}. Save the file as UTF-8.") from error


def _parse_json(text: str, path: Path, first_line: int, remedy: str) -> Any:
    """Parses JSON text that begins at `first_line` of the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line, reason = first_line, str(error)
        if isinstance(error, json.JSONDecodeError):
            line, reason = first_line + error.lineno - 1, f"{error.msg} at column {error.colno}"
        raise InputError(f"{path}:{line}: not valid JSON: {reason}. {remedy}") from error


def _too_large(what: str, limit: int) -> InputError:
    """The error for data beyond a limit."""
    return InputError(f"{what} must have at most {limit >> 20} MiB, got more. Split or shorten the data.")


def _read_whole(path: Path, budget: Budget) -> bytes:
    """The bytes of a file that is parsed as one."""
    with path.open("rb") as file:
        content = file.read(MAX_WHOLE_BYTES + 1)
    if len(content) > MAX_WHOLE_BYTES:
        raise InputError(
            f"{path}: {path.suffix.lower()} file must have at most {MAX_WHOLE_BYTES >> 20} MiB, got more. "
            "Turn it into .jsonl, which is read line by line."
        )
    budget.spend(len(content), str(path))
    return content


def _read_jsonl(path: Path, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Reads one JSON value a line; blank lines are allowed."""
    with path.open("rb") as file:
        for line, raw in enumerate(iter(lambda: file.readline(MAX_RECORD_BYTES + 1), b""), 1):
            if len(raw) > MAX_RECORD_BYTES:
                raise _too_large(f"{path}:{line}: line", MAX_RECORD_BYTES)
            budget.spend(len(raw), f"{path}:{line}")
            text = _decode(raw, path, line).rstrip()
            if text:
                yield f":{line}", _parse_json(text, path, line, "Each line must be one whole JSON object.")


def _read_json(path: Path, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Reads the list at the top of a JSON file, under `data`, or under the only key that holds a list."""
    remedy = "Write a list of objects, or one object a line in a .jsonl file."
    content = _parse_json(_decode(_read_whole(path, budget), path), path, 1, remedy)
    if isinstance(content, dict):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        if "data" in lists:
            content = lists["data"]
        elif len(lists) == 1:
            (content,) = lists.values()
        else:
            found = f"keys {_list_keys(list(content))}" if content else "no keys"
            raise InputError(f"{path}: file must hold one list of records, got an object with {found}. {remedy}")
    if not isinstance(content, list):
        raise InputError(f"{path}: file must hold a list of records, got {_name_type(content)}. {remedy}")
    for i, row in enumerate(content, 1):
        yield f" record {i}", row


def _read_csv(path: Path, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Reads comma-separated rows under a header; a row's position is its first line."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    reader = csv.reader(io.StringIO(_decode(_read_whole(path, budget), path), newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            if fields and not header:
                header = fields
                if len(set(header)) < len(header):
                    message = f"{path}:{line}: column names must differ, got {', '.join(header)}. Rename the columns."
                    raise InputError(message)
            elif fields and len(fields) != len(header):
                raise InputError(
                    f"{path}:{line}: row must have {len(header)} fields, got {len(fields)}. "
                    'Put fields that hold a comma or a newline in "quotes".'
                )
            elif fields:
                yield f":{line}", dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{line}: not valid CSV: {error}. Correct the row or use .jsonl.") from error


def _read_parquet(path: Path, keys: list[str], budget: Budget) -> Iterator[tuple[str, Any]]:
    """Reads the wanted columns of a parquet file."""
    from mgrpo.tables import TableError, read_rows

    try:
        yield from read_rows(path, keys, budget)
    except TableError as error:
        raise InputError(str(error)) from error


def _read_hub(source: str, keys: list[str], split: str, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Reads the wanted columns of a hub data set, which lies on the disk as arrow tables."""
    import datasets

    from mgrpo.tables import TableError, read_table

    try:
        dataset = datasets.load_dataset(source, split=split)
    except Exception as error:  # the hub client raises its own, httpx's, OS and value errors
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise InputError(
            f"{source}: neither a path nor a reachable hub data set with split {split!r}: {reason}."
            f"{_suggest_path(source)} Check the name and the network, or name a local file."
        ) from error
    try:
        yield from read_table(dataset, source, keys, budget)
    except TableError as error:
        raise InputError(str(error)) from error


def _make_record(row: Any, keys: list[str], *, where: str, origin: str) -> Record:
    """Checks one raw row and makes a record of it."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: record must be an object, got {_name_type(row)}. Write {{{keys[0]!r}: ...}}.")
    if keys[0] not in row:
        names = [str(key) for key in row]
        close = difflib.get_close_matches(keys[0], names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"{where}: record must have the key {keys[0]!r}, got {_list_keys(names)}.{hint} "
            "Name the key with --data.prompt-key."
        )
    answer = _normalize_answer(row.get(keys[1]), keys[1], where) if len(keys) > 1 else None
    return Record(prompt=_check_prompt(row[keys[0]], keys[0], where), answer=answer, origin=origin)


def _list_keys(names: list[str]) -> str:
    """The first keys, each cut short, as a part of a sentence."""
    shown = [f"{name:.80}" for name in names[:NAMED_KEYS]]
    return ", ".join(shown + ["..."] * (len(names) > NAMED_KEYS)) or "no keys"


def _check_prompt(prompt: Any, key: str, where: str) -> str | list[dict[str, Any]]:
    """Returns a prompt that is text or a non-empty list of chat messages with text in at least one."""
    if isinstance(prompt, str):
        texts = [prompt]
    elif isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        # Columnar formats fill the fields that a message lacks with nulls.
        prompt = [{name: value for name, value in message.items() if value is not None} for message in prompt]
        for message in prompt:
            if not all(isinstance(message.get(name), str) for name in ("role", "content")):
                raise InputError(
                    f"{where}: each message of {key!r} must have a 'role' and a 'content' of text, "
                    f"got {message!r:.80}. Correct the message."
                )
            check_unicode(message["role"], f"{key!r} role", where)
        texts = [message["content"] for message in prompt]
    else:
        raise InputError(
            f"{where}: {key!r} must be text or a list of chat messages, got {_name_type(prompt)}. "
            "Correct the record or name another key with --data.prompt-key."
        )
    if not any(text.strip() for text in texts):
        raise InputError(f"{where}: {key!r} must hold text, got a blank prompt. Remove or complete the record.")
    for text in texts:
        check_unicode(text, repr(key), where)
    if sum(map(len, texts)) > MAX_RECORD_BYTES:
        raise _too_large(f"{where}: {key!r}", MAX_RECORD_BYTES)
    return prompt


def _normalize_answer(value: Any, key: str, where: str) -> str | None:
    """Turns an answer into text; null, NaN and blank text are no answer."""
    if value is None or (isinstance(value, (float, Decimal)) and math.isnan(value)):
        return None
    if not isinstance(value, (str, int, float, Decimal)):
        raise InputError(
            f"{where}: {key!r} must be text or a number, got {_name_type(value)}. "
            "Correct the record or name another key with --data.answer-key."
        )
    try:
        answer = str(value)
    except ValueError:  # Python refuses to write an integer of more than 4,300 digits
        return None
    check_unicode(answer, repr(key), where)
    return answer if answer.strip() else None


def check_unicode(text: str, what: str, where: str) -> None:
    """Refuses lone surrogates, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InputError(
            f"{where}: {what} must be valid Unicode, got the lone surrogate U+{code:04X}. Correct or remove it."
        ) from error


def _name_type(value: Any) -> str:
    """Names a value's type as data files do."""
    return {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}.get(
        type(value), f"{type(value).__name__} {value!r:.40}"
    )
