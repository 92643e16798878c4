"""True answers as text, from the values of data files and libraries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from mgrpo.errors import InputError
from mgrpo.inputs import check_unicode, list_names, name_type

Label = str | tuple[str, ...]
"""A true answer, or several, any of which is right."""
MAX_ANSWERS = 64  # of one record


def label_text(value: Any, key: str, where: str) -> Label | None:
    """The text of a true answer, or of each where there are several.

    Args:
        value: text, a number, a list of those, or the same in numpy; null, NaN and blank text are no answer.
        key: key of the answer, for errors.
        where: place of the record, for errors.

    Returns:
        A list's only answer, or all its different ones as a tuple: a response that equals any of them is right.

    Raises:
        InputError: another type, more than 64 answers, or invalid Unicode.

    """
    value = _plain(value)
    if not isinstance(value, list | tuple):
        return _to_text(value, key, where)
    if len(value) > MAX_ANSWERS:
        raise InputError(f"{where}: {key!r} must have at most {MAX_ANSWERS} answers, got {len(value)}. Choose some.")
    if any(isinstance(item, Mapping) for item in value):
        raise InputError(
            f"{where}: {key!r} must be text, a number or a list of those, got a list of objects. "
            "Correct the record or name another key with --data.answer-key."
        )
    texts = dict.fromkeys(_to_text(_plain(item), key, where) for item in value)
    return join_labels([text for text in texts if text is not None])


def join_labels(labels: list[str]) -> Label | None:
    """Several answers as a tuple, one as text, none as None."""
    return tuple(labels) if len(labels) > 1 else next(iter(labels), None)


def _plain(value: Any) -> Any:
    """Python values of numpy numbers and arrays, each number with the digits that it prints."""
    if hasattr(value, "astype") and getattr(value.dtype, "kind", "") == "f" and value.dtype.itemsize < 8:
        value = value.astype(str).astype(float)  # 0.1 in fp32 is not 0.1 in fp64
    return value.tolist() if hasattr(value, "tolist") else value


def _to_text(value: Any, key: str, where: str) -> str | None:
    """The text of one answer."""
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
        return None
    if not isinstance(value, str | int | float | Decimal):
        names = list_names(f"{key}.{name}" for name in value) if isinstance(value, Mapping) and value else ""
        raise InputError(
            f"{where}: {key!r} must be text or a number, got {name_type(value)}. "
            f"Correct the record or name another key with --data.answer-key{', such as ' + names if names else ''}."
        )
    try:
        answer = str(value)
    except ValueError:  # Python refuses to write an integer of more than 4,300 digits
        return None
    check_unicode(answer, repr(key), where)
    return answer if answer.strip() else None
