"""What is wrong with an input: its error, and the words for keys, types and sizes in messages."""

from __future__ import annotations

import ast
import difflib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from mgrpo.errors import InputError

# The bytes of one record, and of a file that is parsed as one, which may take 25 times its size meanwhile.
MAX_RECORD_BYTES = 4 << 20
MAX_WHOLE_BYTES = 64 << 20
MAX_LITERAL_CHARS = 1 << 16  # of a value as Python prints it
NAMED_KEYS = 20  # in messages


class Budget(Protocol):
    """What may still be read; each method raises an error that names `where` if more is asked for."""

    def spend(self, num_bytes: int, where: str) -> None:
        """Takes bytes off."""
        ...

    def expect(self, num_bytes: int, where: str) -> None:
        """Asks for bytes that are taken off later."""
        ...

    def check_record(self, num_bytes: int, where: str) -> None:
        """Asks for one record of that many bytes."""
        ...

    def check_records(self, num_records: int, where: str) -> None:
        """Asks for that many records."""
        ...


def too_large(what: str, limit: int) -> InputError:
    """The error for data beyond a limit."""
    return InputError(f"{what} must have at most {limit >> 20} MiB, got more. Split or shorten the data.")


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
    """The list or object that a text spells in JSON, or as Python prints it; None where it spells none."""
    bare = text.strip()
    if bare[:1] + bare[-1:] not in ("{}", "[]"):
        return None
    try:
        value = json.loads(bare)
    except (ValueError, RecursionError):
        value = _parse_literal(bare) if len(bare) <= MAX_LITERAL_CHARS else None
    return value if isinstance(value, dict | list) else None


def _parse_literal(text: str) -> Any:
    """The value of a Python literal, None where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def name_type(value: Any) -> str:
    """Names a value's type as data files do."""
    return {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}.get(
        type(value), f"{type(value).__name__} {value!r:.40}"
    )


def list_names(names: Iterable[str]) -> str:
    """The first names, each cut short, as a part of a sentence."""
    shown = [f"{name:.80}" for name in names]
    return ", ".join(shown[:NAMED_KEYS] + ["..."] * (len(shown) > NAMED_KEYS)) or "no keys"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is nearest, if one is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)
