"""Extraction of the answer from a response."""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Callable

from mgrpo.errors import InputError
from mgrpo.grading.canonical import MAX_ANSWER_CHARS
from mgrpo.grading.headings import find_hash
from mgrpo.grading.prose_numbers import find_last_number
from mgrpo.grading.thoughts import drop_thought

_BOX_OR_BRACE = re.compile(r"\\{1,2}(?:boxed|fbox)(?![A-Za-z])\s*(?:(\{)|([^\s{}$\\]+))?|\\.|([{}])", re.DOTALL)
_GROUP = r"\s*\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_PLACEHOLDER = re.compile(
    r"(?:[\s.…_?~$*,;:<>(\[{)\]}|'\"%□■▢◯⬜\u200b\u2060\ufeff-]|\\[,;:!>_%()\[\]\s]|&nbsp;"
    rf"|\\(?:[hv]?phantom|[hv]space\*?|(?:text)?color){_GROUP}|\\rule(?:\[[^\[\]]*\])?{_GROUP}{_GROUP}"
    r"|\\(?:[lcd]dots|dots[cb]?|cdot|square|Box|blacksquare|bigcirc|blank|bullet|q?quad|underline|displaystyle|[lr]angle|text[a-z]*|math[a-z]*)(?![A-Za-z])"
    r"|(?<![A-Za-z])(?:(?:insert|put|write|the|your|my|final|correct|numeric(?:al)?|option|choice|letter|value|result|solution|this|"
    r"expression|number|answer|ans|here|placeholder|goes|in|notation|format|command|environment|box|xxx|tbd|content|"
    r"votre|réponse|finale?|su|respuesta|deine|ihre|endgültige|antwort|sua|resposta|risposta|ваш|ответ)(?![A-Za-z]))"
    r"|你的|您的|最终|最終|正确|答案|答え|答|정답|답|在此|填入|写|这里|\\boxed|\\fbox)*",
    re.IGNORECASE,
)
MAX_PLACEHOLDER_CHARS = 100


def make_extractor(spec: str) -> Callable[[str], str | None]:
    r"""Returns the function that extracts the answer of a response, None where the response has none.

    Args:
        spec: `boxed` (the content of the last complete \boxed{...} or \fbox{...}, or the word after a \boxed without
            braces; boxes that are empty or hold a placeholder such as `...` do not count), `hash` (the rest of the
            line after the last ####, or the next line with text where the rest is a heading without digit or formula),
            `last-number` (an integer, decimal, fraction, root, power, ratio or time with its sign, without a percent
            sign), or `regex:PATTERN` (the last match; its group where the pattern has one).

    Returns:
        A function of the response that never raises. It reads the text behind the last closed thought (such as
        `</think>`) and finds no answer where a thought is left open; a mark in the prompt that opens the thought has to
        be put in front of the response (`thoughts.decode_responses`). Answers are stripped; an empty one, or one of
        more than 1,000 characters, is None.

    Raises:
        ValueError: unknown spec, or a pattern that is empty, invalid, or has more than one group.

    Cost: linear in the response's length, except for `regex:`, which costs what its pattern does.
    """
    if spec.startswith("regex:"):
        find = functools.partial(_find_pattern, _compile_pattern(spec))
    elif spec in _FINDERS:
        find = _FINDERS[spec]
    else:
        raise InputError(
            f"make_extractor: spec must be boxed, hash, last-number or regex:PATTERN, got {spec!r}. "
            "Choose the form in which the prompt asks for the answer."
        )

    def extract(text: str) -> str | None:
        rest = drop_thought(text)
        answer = ((rest and find(rest)) or "").strip()
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
    last = deque(pattern.finditer(text), maxlen=1)
    return last[0][pattern.groups] if last else None


def _find_boxed(text: str) -> str | None:
    """The content of the complete, non-empty box that starts last."""
    if "boxed" not in text and "fbox" not in text:
        return None
    start, answer = -1, None
    open_boxes: list[int | None] = []  # the start of each open brace's content, None where it is no box
    for token in _BOX_OR_BRACE.finditer(text):
        box_brace, bare, brace = token.groups()
        if box_brace:
            open_boxes.append(token.end())
        elif bare and not _is_placeholder(bare):
            start, answer = token.start(2), bare
        elif brace == "{":
            open_boxes.append(None)
        elif brace == "}" and open_boxes:
            opened = open_boxes.pop()
            # Slicing every nested box would be quadratic; a box around a later one is never the answer.
            if opened is not None and opened > start and not _is_placeholder(text, opened, token.start()):
                start, answer = opened, text[opened : token.start()]
    return answer


def _is_placeholder(text: str, start: int = 0, end: int | None = None) -> bool:
    """Whether a box is blank or holds only words such as "your answer here"."""
    end = len(text) if end is None else end
    if end - start > MAX_PLACEHOLDER_CHARS or "\\{" in text[start:end]:
        return False
    content = text[start:end]
    return bool(_PLACEHOLDER.fullmatch(content)) and not re.fullmatch(r"\s*(?:[<>|-]|\(\)|\[\])\s*", content)


_FINDERS: dict[str, Callable[[str], str | None]] = {
    "boxed": _find_boxed,
    "hash": find_hash,
    "last-number": find_last_number,
}
