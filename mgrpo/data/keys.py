"""Looks up the keys of prompt and answer in records, where dots reach into objects, and suggests similar keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mgrpo.errors import InputError
from mgrpo.inputs import list_names, nearest, parse_value

ABSENT = object()  # look_up's result for an absent key
MAX_SEEN = 200
NESTED = 3  # levels of objects whose keys are listed
# Other names that data sets have for a prompt.
PROMPT_NAMES = ("messages", "conversations", "conversation", "question", "problem", "instruction", "query", "input")


class Keys:
    """The keys to read, and the keys that records had."""

    def __init__(self, prompt: str, answer: str | None) -> None:
        self.prompt, self.answer = prompt, answer
        self.seen: dict[str, None] = {}  # in order of appearance, at most MAX_SEEN
        self.has_answer = False  # True once a record had the answer's key

    @property
    def wanted(self) -> list[str]:
        """The keys to read, the prompt's first, each once."""
        return list(dict.fromkeys([self.prompt, *([] if self.answer is None else [self.answer])]))

    def note(self, names: Iterable[str]) -> None:
        """Adds the keys of a record to those seen."""
        if len(self.seen) < MAX_SEEN:
            self.seen.update(dict.fromkeys(names))

    def find_answer(self, row: Mapping[str, Any]) -> Any:
        """The answer of a record, None where it has none."""
        value = ABSENT if self.answer is None else look_up(row, self.answer)
        self.has_answer |= value is not ABSENT
        return None if value is ABSENT else value

    def no_prompt(self, names: list[str], where: str) -> InputError:
        """The error for a record with these keys; suggests the nearest, else one of a prompt's usual names."""
        usual = next((f" Did you mean {name!r}?" for name in PROMPT_NAMES if name in names), "")
        return InputError(
            f"{where}: record must have the key {self.prompt!r}, got {list_names(names)}."
            f"{suggest_key(self.prompt, names) or usual} Name the key with --data.prompt-key."
        )

    def require_answer(self, where: str) -> None:
        """Raises InputError where no record had the answer's key."""
        if self.answer is not None and not self.has_answer:
            names = [name for name in self.seen if name != self.prompt] or self.seen
            raise InputError(
                f"{where}: --data.answer-key must be the key of an answer, got {self.answer!r}, which no record has. "
                f"Keys are {list_names(self.seen)}.{suggest_key(self.answer, names)} Name one of them."
            )


def look_up(row: Mapping[str, Any], key: str) -> Any:
    """The value under a key, or ABSENT; `a.b` is the key `b` of the object `a`, unless there is a key `a.b`.

    The object may be written as text, as in tables that cannot hold objects.
    """
    if key in row:
        return row[key]
    end = key.rfind(".")
    while end > 0:
        inner = row.get(key[:end])
        inner = parse_value(inner) if isinstance(inner, str) else inner
        if isinstance(inner, Mapping):
            value = look_up(inner, key[end + 1 :])
            if value is not ABSENT:
                return value
        end = key.rfind(".", 0, end)
    return ABSENT


def name_keys(row: Mapping[Any, Any], prefix: str = "", depth: int = NESTED) -> list[str]:
    """The keys of a record; those of nested objects with dots."""
    names: list[str] = []
    for key, value in row.items():
        if len(names) > MAX_SEEN:
            break
        if isinstance(value, Mapping) and value and depth > 1:
            names += name_keys(value, f"{prefix}{key}.", depth - 1)
        else:
            names.append(f"{prefix}{key}")
    return names


def suggest_key(key: str, names: Iterable[str]) -> str:
    """Suggests the nearest key, whole or by its last part, as a sentence behind a space; or an empty string."""
    names = [f"{name:.80}" for name in names]
    ends = {name.rpartition(".")[2]: name for name in reversed(names)}
    near = nearest(key, names) or ends.get(nearest(key.rpartition(".")[2], ends) or "")
    return f" Did you mean {near!r}?" if near else ""
