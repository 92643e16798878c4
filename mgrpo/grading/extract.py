"""The answer of a response."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from mgrpo.grading.canonical import MAX_ANSWER_CHARS
from mgrpo.records import InputError

_BOX_OR_BRACE = re.compile(r"\\{1,2}(?:boxed|fbox)(?![A-Za-z])\s*(?:(\{)|([^\s{}$\\]+))?|\\.|([{}])", re.DOTALL)
_LAST_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[+\-\u2212])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))+|[0-9]+)(?:\.[0-9]+|/[0-9]+)?|(?<![0-9])\.[0-9]+)"
)


def make_extractor(spec: str) -> Callable[[str], str | None]:
    r"""Returns the function that takes the answer out of a response, or None where the response has none.

    Args:
        spec: `boxed` (the content of the last complete \boxed{...} or \fbox{...}, or the word after a \boxed without
            braces), `hash` (the rest of the line after the last ####), `last-number` (an integer, decimal or
            fraction with its sign, without a percent sign), or `regex:PATTERN` (the last match; its group where
            the pattern has one).

    Returns:
        A function of the response that never raises. Answers are stripped; an empty one, or one longer than
        1,000 characters, is None.

    Raises:
        ValueError: unknown spec, or a pattern that is empty, invalid, or has more than one group.

    Cost: linear in the response, but for `regex:`, whose cost is the pattern's.
    """
    if spec.startswith("regex:"):
        find = functools.partial(_find_pattern, _compile_pattern(spec))
    elif spec in _FINDERS:
        find = _FINDERS[spec]
    else:
        raise InputError(
            f"make_extractor: spec must be boxed, hash, last-number or regex:PATTERN, got {spec!r}. "
            "Choose how the model is told to mark its answer."
        )

    def extract(text: str) -> str | None:
        answer = (find(text) or "").strip()
        return answer if 0 < len(answer) <= MAX_ANSWER_CHARS else None

    return extract


def _compile_pattern(spec: str) -> re.Pattern[str]:
    """Compiles the pattern of a `regex:` spec."""
    try:
        pattern = re.compile(spec.removeprefix("regex:"))
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"make_extractor: spec must be regex: and a valid pattern, got {spec!r} ({error}). Correct the pattern."
        ) from error
    if not pattern.pattern or pattern.groups > 1:
        raise InputError(
            f"make_extractor: spec must be regex: and a pattern with at most one group, got {spec!r}. "
            "Turn the other groups into (?:...)."
        )
    return pattern


def _find_pattern(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match, or its group."""
    last = None
    for match in pattern.finditer(text):
        last = match
    return last and last[pattern.groups]


def _find_boxed(text: str) -> str | None:
    """The content of the box that starts last among the complete ones."""
    if "boxed" not in text and "fbox" not in text:
        return None
    start, answer = -1, None
    open_boxes: list[int | None] = []  # one entry an open brace: where its content starts, None for no box
    for token in _BOX_OR_BRACE.finditer(text):
        box_brace, bare, brace = token.groups()
        if box_brace:
            open_boxes.append(token.end())
        elif bare:
            start, answer = token.start(2), bare
        elif brace == "{":
            open_boxes.append(None)
        elif brace == "}" and open_boxes:
            opened = open_boxes.pop()
            # Slicing every box of a deep nest would be quadratic; a box around the best one is never wanted.
            if opened is not None and opened > start:
                start, answer = opened, text[opened : token.start()]
    return answer


def _find_hash(text: str) -> str | None:
    """The rest of the line after the last ####."""
    _, marker, rest = text.rpartition("####")
    return re.split(r"[\r\n]", rest, maxsplit=1)[0] if marker else None


_FINDERS: dict[str, Callable[[str], str | None]] = {
    "boxed": _find_boxed,
    "hash": _find_hash,
    "last-number": functools.partial(_find_pattern, _LAST_NUMBER),
}
