"""Reads rows of .csv and .tsv files with any common separator."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mgrpo.data.keys import Keys
from mgrpo.errors import InputError
from mgrpo.inputs import MAX_RECORD_BYTES, decode

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
# The line in which spreadsheets name the separator.
SEPARATOR_LINE = re.compile(r'"?sep=([,;\t|])"?[ \t]*(?:\r\n?|\n)', re.IGNORECASE)
_OTHER_SEPARATOR = re.compile(r"(?<=\w)[ \"']*[~^:!#@&%*+=\\/\x1c-\x1f¦§·]+[ \"']*(?=\w)")
MAX_HEADER_CHARS = 1 << 20


def read_csv(content: bytes, path: Path, keys: Keys) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the rows under a header, each with the line at which it begins.

    The separator is the one with which the header has the wanted keys, else the most fields. Spaces around names, blank
    rows, and columns at the end without a name and text are ignored.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    text, line = decode(content, path), 1
    separator, names = "", []
    if named := SEPARATOR_LINE.match(text):
        separator, text, line = named[1], text[named.end() :], 2
    separator, spaced = _sniff(text, separator or ("\t" if ".tsv" in path.name.lower() else ""), bool(named), keys)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=spaced, strict=True)
    first = line
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                if names:
                    yield f":{line}", _make_row(fields, names, separator, f"{path}:{line}")
                else:
                    names = _read_header(fields, f"{path}:{line}", keys)
            line = reader.line_num + first
    except csv.Error as error:
        raise InputError(f"{path}:{line}: not valid CSV: {error}. Correct the row or use .jsonl.") from error


def _sniff(text: str, given: str, is_named: bool, keys: Keys) -> tuple[str, bool]:
    """Returns the separator, and whether a space follows it everywhere in the header."""
    found = {}
    for separator in [given] if is_named else dict.fromkeys([given or ",", *SEPARATORS]):
        reader = csv.reader(io.StringIO(text[:MAX_HEADER_CHARS], newline=""), delimiter=separator, strict=True)
        try:
            fields = next((row for row in reader if any(field.strip() for field in row)), [])
        except csv.Error:
            continue
        names = {field.strip() for field in fields}
        spaced = len(fields) > 1 and separator != "\t" and all(field[:1] == " " for field in fields[1:])
        found[separator] = ([key in names for key in keys.wanted], len(fields)), spaced
    if not found:
        return given or ",", False
    best = max(found, key=lambda separator: found[separator][0])  # the first of equals
    return best, found[best][1]


def _read_header(fields: list[str], where: str, keys: Keys) -> list[str]:
    """Names of the columns, without unnamed ones at the end."""
    names = [field.strip() for field in fields]
    while not names[-1]:
        names.pop()
    # A single column whose name looks like several with another separator between them.
    joined = len(_OTHER_SEPARATOR.split(names[0])) > 1 or keys.prompt in names[0].split()
    if len(names) == 1 and keys.prompt != names[0] and joined:
        raise InputError(
            f"{where}: fields must be separated by {', '.join(SEPARATORS.values())}, got the header {names[0]!r:.80}. "
            "Save the file with one of these separators."
        )
    named = [name for name in names if name]
    if len(set(named)) < len(named):
        raise InputError(f"{where}: column names must differ, got {', '.join(named)}. Rename the columns.")
    return names


def _make_row(fields: list[str], names: list[str], separator: str, where: str) -> dict[str, Any]:
    """The fields by column name; unnamed columns are left out."""
    while len(fields) > len(names) and not fields[-1].strip():
        fields.pop()
    if len(fields) != len(names):
        remedy = " Complete the row if it ends early." if len(fields) < len(names) else ""
        raise InputError(
            f"{where}: row must have {len(names)} fields, got {len(fields)}. "
            f'Put fields that hold a {SEPARATORS[separator]} or a newline in "quotes".{remedy}'
        )
    return {name: field for name, field in zip(names, fields, strict=True) if name}
