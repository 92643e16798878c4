"""Limits and parsing of input data, and the words of its error messages."""

from __future__ import annotations

import ast
import difflib
import json
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from mgrpo.errors import ConfigError, InputError

# Limits of a data set, so that no file can fill the memory: bytes of all text, and records.
MAX_TEXT_BYTES = 1 << 30
MAX_RECORDS = 10_000_000
# Bytes of one record, and of a file that is parsed as a whole, which may take 25 times its size in memory.
MAX_RECORD_BYTES = 4 << 20
MAX_WHOLE_BYTES = 64 << 20
MAX_LITERAL_CHARS = 1 << 16  # of a value as Python prints it
NAMED_KEYS = 20  # in messages


T = TypeVar("T")


class Problems(list[str]):
    """Messages of several checks, so that all are reported at once."""

    def attempt(self, check: Callable[[], T]) -> T | None:
        """The result of a check; None if it raises an error about an input, whose message is added."""
        try:
            return check()
        except ConfigError as error:
            self.extend(error.problems)
        except ValueError as error:
            self.append(str(error))
        return None


class Budget:
    """The data of a source that may still be read; beyond it each method raises an InputError that names `where`."""

    def __init__(self) -> None:
        self.bytes_read = self.records_read = 0

    def spend(self, num_bytes: int, where: str) -> None:
        """Counts the bytes of data that is read up to a place."""
        self.bytes_read += num_bytes
        if self.bytes_read > MAX_TEXT_BYTES:
            raise too_large(f"{where}: data up to here", MAX_TEXT_BYTES)

    def expect(self, num_bytes: int, where: str) -> None:
        """Checks the bytes that a file claims to hold, which are counted as they are read."""
        if self.bytes_read + num_bytes > MAX_TEXT_BYTES:
            raise too_large(f"{where}: data up to the end of the file", MAX_TEXT_BYTES)

    def check_record(self, num_bytes: int, where: str) -> None:
        """Checks the bytes of one record."""
        if num_bytes > MAX_RECORD_BYTES:
            raise too_large(f"{where}: record", MAX_RECORD_BYTES)

    def check_records(self, num_records: int, where: str) -> None:
        """Checks the records that a file claims to hold."""
        if self.records_read + num_records > MAX_RECORDS:
            raise InputError(f"{where}: data set must have at most {MAX_RECORDS} records, got more. Split the data.")

    def spend_record(self, where: str) -> None:
        """Counts one record."""
        self.check_records(1, where)
        self.records_read += 1


def too_large(what: str, limit: int, remedy: str = "Split or shorten the data.") -> InputError:
    """The error for data beyond a limit."""
    return InputError(f"{what} must have at most {limit >> 20} MiB, got more. {remedy}")


def decode(raw: bytes, path: Path, first_line: int = 1) -> str:
    """Decodes UTF-8 with or without a byte order mark."""
    if b"\0" in raw[:4]:
        raise InputError(f"{path}:{first_line}: not valid UTF-8: zero bytes, as UTF-16 has. Save the file as UTF-8.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + error.object.count(b"\n", 0, error.start)
        raise InputError(f"{path}:{line}: not valid UTF-8: {error.reason}. Save the file as UTF-8.") from error


def parse_json(text: str, path: Path, first_line: int, remedy: str) -> Any:
    """Parses JSON text that begins at `first_line` of the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line, reason = first_line, str(error)
        if isinstance(error, json.JSONDecodeError):
            line, reason = first_line + error.lineno - 1, f"{error.msg} at column {error.colno}"
        raise InputError(f"{path}:{line}: not valid JSON: {reason}. {remedy}") from error


def check_unicode(text: str, what: str, where: str) -> None:
    """Refuses lone surrogates, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InputError(
            f"{where}: {what} must be valid Unicode, got the lone surrogate U+{code:04X}. Correct or remove it."
        ) from error


def parse_value(text: str) -> Any:
    """The list or object that a text holds in JSON or as Python prints it, else None."""
    bare = text.strip()
    if bare[:1] + bare[-1:] not in ("{}", "[]"):
        return None
    try:
        value = json.loads(bare)
    except (ValueError, RecursionError):
        value = _parse_literal(bare) if len(bare) <= MAX_LITERAL_CHARS else None
    return value if isinstance(value, dict | list) else None


def _parse_literal(text: str) -> Any:
    """The value of a Python literal, None for any other text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unknown escapes
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def name_type(value: Any) -> str:
    """Names a value's type in the words of data files."""
    return {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}.get(
        type(value), f"{type(value).__name__} {value!r:.40}"
    )


def list_names(names: Iterable[str]) -> str:
    """The first names, each shortened, as a part of a sentence."""
    shown = [f"{name:.80}" for name in names]
    return ", ".join(shown[:NAMED_KEYS] + ["..."] * (len(shown) > NAMED_KEYS)) or "no keys"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is nearest, if one is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


UNITS = {
    "": 1,
    **{
        f"{letter}{b}": base**power for power, letter in enumerate("KMGT", 1) for b, base in (("B", 1000), ("iB", 1024))
    },
}


def as_bytes(num_bytes: float) -> str:
    """A number of bytes in GiB, in MiB below one."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def read_bytes(text: str) -> int | None:
    """A number of bytes as `80GiB`, `24GB` or `1000`; None for anything else, and for less than one byte."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?(\w*)", text, re.ASCII)
    if match is None or match[2] not in UNITS:
        return None
    return int(float(match[1]) * UNITS[match[2]]) or None
