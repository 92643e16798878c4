"""Reads records of JSON files: one a line, in a list, or in the table layouts of libraries."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mgrpo.data.files import open_bytes, read_whole
from mgrpo.data.keys import ABSENT, Keys, look_up
from mgrpo.data.messages import is_chat
from mgrpo.errors import InputError
from mgrpo.inputs import MAX_RECORD_BYTES, Budget, decode, list_names, name_type, parse_json, too_large

FOLLOWING_BYTES = 1 << 16  # searched for a second line
REMEDY = "Write a list of objects, or one object a line in a .jsonl file."


def read_lines(file: BinaryIO, path: Path, keys: Keys, split: str, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Yields one JSON value a line; blank lines are allowed, and a file that begins with `[` is one list."""
    first = file.readline(MAX_RECORD_BYTES + 1)
    if first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        yield from _read_content(read_whole(file, path, budget, first), path, keys, split)
        return
    for line, raw in enumerate(itertools.chain([first], iter(lambda: file.readline(MAX_RECORD_BYTES + 1), b"")), 1):
        if len(raw) > MAX_RECORD_BYTES:
            raise too_large(f"{path}:{line}: line", MAX_RECORD_BYTES)
        budget.spend(len(raw), f"{path}:{line}")
        text = decode(raw, path, line).rstrip()
        if text:
            yield f":{line}", parse_json(text, path, line, "Each line must be one whole JSON object.")


def read_json(file: BinaryIO, path: Path, keys: Keys, split: str, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Yields the records of a .json file, line by line if the first line is a whole object and more follow."""
    first = file.readline(MAX_RECORD_BYTES + 1)
    while first.isspace() and len(first) < FOLLOWING_BYTES and (line := file.readline(MAX_RECORD_BYTES + 1)):
        first += line
    if _is_object(first):
        rest = file.read(FOLLOWING_BYTES)
        if rest.strip():
            with open_bytes(path) as again:
                yield from read_lines(again, path, keys, split, budget)
            return
        first += rest
    yield from _read_content(read_whole(file, path, budget, first), path, keys, split)


def _is_object(line: bytes) -> bool:
    """Whether a line is a whole JSON object."""
    if line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"{":
        return False
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _read_content(content: bytes, path: Path, keys: Keys, split: str) -> Iterator[tuple[str, Any]]:
    """Yields the records of a file that is one JSON value."""
    rows = _find_rows(parse_json(decode(content, path), path, 1, REMEDY), path, keys, split)
    for i, row in enumerate(rows, 1):
        yield f" record {i}", row


def _find_rows(content: Any, path: Path, keys: Keys, split: str) -> Iterable[Any]:
    """Finds the records in a JSON value.

    They are a list; the list under `data`, the split, or the only key with a list; a table by columns or by rows; or
    a single record.
    """
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise InputError(f"{path}: file must hold a list of records, got {name_type(content)}. {REMEDY}")
    data, columns, prompt = content.get("data"), content.get("columns"), look_up(content, keys.prompt)
    if isinstance(data, list):
        if isinstance(columns, list) and not any(isinstance(row, dict) for row in data):
            return _split_rows(columns, data, path)
        if prompt is ABSENT or any(isinstance(row, dict) for row in data):
            return data
    if isinstance(prompt, str) or is_chat(prompt):
        return [content]
    if isinstance(prompt, dict) or (isinstance(prompt, list) and not any(isinstance(item, dict) for item in prompt)):
        return _column_rows(content, prompt, path)
    lists = {key: value for key, value in content.items() if isinstance(value, list)}
    if split in lists:
        return lists[split]
    if content and all(isinstance(row, dict) and look_up(row, keys.prompt) is not ABSENT for row in content.values()):
        return content.values()  # a table by row names or numbers
    if len(lists) == 1:
        return next(iter(lists.values()))
    tables = [key for key, value in lists.items() if value and all(isinstance(row, dict) for row in value)]
    if len(tables) > 1:
        raise InputError(
            f"{path}: --data.split must be one of its lists, {list_names(tables)}, got {split!r}. Name one of them."
        )
    found = f"keys {list_names(content)}" if content else "no keys"
    raise InputError(f"{path}: file must hold one list of records, got an object with {found}. {REMEDY}")


def _split_rows(columns: list[Any], data: list[Any], path: Path) -> Iterator[dict[str, Any]]:
    """Records of a table with separate column names, pandas' orient="split"."""
    names = [str(name) for name in columns]
    for i, row in enumerate(data, 1):
        if not isinstance(row, list) or len(row) != len(names):
            found = f"a list of {len(row)}" if isinstance(row, list) else name_type(row)
            raise InputError(f"{path} record {i}: row must be a list of {len(names)} values, got {found}. Correct it.")
        yield dict(zip(names, row, strict=True))


def _column_rows(content: dict[str, Any], prompt: Any, path: Path) -> Iterator[dict[str, Any]]:
    """Records of a table by columns: lists, or objects from rows to values, pandas' orient="columns"."""
    columns = {name: column for name, column in content.items() if type(column) is type(prompt)}
    for name, column in columns.items():
        if len(column) != len(prompt):
            raise InputError(
                f"{path}: columns must have as many rows as the prompt's column, {len(prompt)}, "
                f"got {len(column)} in {name!r:.80}. {REMEDY}"
            )
    rows: Iterable[Any] = prompt if isinstance(prompt, dict) else range(len(prompt))
    for row in rows:
        try:
            yield {name: column[row] for name, column in columns.items()}
        except KeyError as error:
            raise InputError(f"{path}: each column must have the row {row!r:.80}, got none. {REMEDY}") from error
