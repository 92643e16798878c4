"""One form for answers that are written differently and mean the same."""

from __future__ import annotations

import functools
import re
import unicodedata

MAX_ANSWER_CHARS = 1000

_SUPERSCRIPTS = re.compile("[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁱⁿ]+")
_SUBSCRIPTS = re.compile("[₀-₉₊₋₍₎]+")
_VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞↉]")
_SYMBOLS = str.maketrans(
    {
        "\u2044": "/",
        "−": "-",  # noqa: RUF001
        "∞": r"\infty ",
        "π": r"\pi ",
        "×": r"\times ",  # noqa: RUF001
        "÷": "/",
        "·": r"\cdot ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "°": r"^\circ ",
        "~": " ",
    }
)
_NUMBER = re.compile(r"([+-]?)([0-9]{1,3}(?:[ ,][0-9]{3})+|[0-9]*)(?:\.([0-9]*))?")
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"√\s*([0-9]+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"\\?\$", ""),
        (r"\\%", "%"),
        (r"\\(?:left|right)(?![A-Za-z])\.?", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"(?<=[0-9])(?:\\[,!]|\{,\})(?=[0-9]{3})", ","),
        (r"\\!", ""),
        (r"\\q?quad(?![A-Za-z])|(?<!\\)\\[,;:>\s]", " "),
        (r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm)|mbox|fbox|boxed)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\frac\s*([0-9])(?=\s*[0-9{])", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
        (r"^\s*\\\((.*)\\\)\s*$|^\s*\\\[(.*)\\\]\s*$", r"\1\2"),
        (r"\s+", " "),
        (r" ?([^A-Za-z0-9 ]) ?", r"\1"),
        (r"^(-?[0-9]+) ([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}"),
        (r"^\+|[. ]+$", ""),
    )
]


def canonicalize(answer: str) -> str:
    r"""Rewrites an answer to the form in which equal strings are the same answer; deterministic and idempotent.

    Unicode is composed (NFKC; superscripts become powers), LaTeX spacing, `$`, \left, \right and text wrappers go,
    \dfrac becomes \frac with braces, and a plain number loses thousands separators, a plus sign, leading zeros and
    trailing decimal zeros. An answer of more than 1,000 characters is only stripped.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return answer.strip()
    return _normalize_number(answer) or _canonicalize(answer)


@functools.lru_cache(maxsize=16384)
def _canonicalize(answer: str) -> str:
    """Repeats the rewrites until nothing changes, which makes them idempotent."""
    while (rewritten := _rewrite(answer)) != answer:
        answer = rewritten
    return answer


def _rewrite(text: str) -> str:
    """One pass over all rewrites."""
    # NFKC alone would turn x² into x2, log₂8 into log28 and 1½ into 11/2.
    text = _SUPERSCRIPTS.sub(r"^{\g<0>}", text)
    text = _SUBSCRIPTS.sub(r"_{\g<0>}", text)
    text = _VULGAR_FRACTION.sub(_spell_fraction, text)
    text = unicodedata.normalize("NFKC", text).translate(_SYMBOLS).strip()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return _normalize_number(text) or text


def _spell_fraction(match: re.Match[str]) -> str:
    """The LaTeX of a one-character fraction."""
    numerator, denominator = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _normalize_number(text: str) -> str | None:
    """The shortest decimal notation of a plain number, None for any other text."""
    match = _NUMBER.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        return None
    whole = match[2].replace(",", "").replace(" ", "").lstrip("0") or "0"
    decimals = (match[3] or "").rstrip("0")
    number = f"{whole}.{decimals}" if decimals else whole
    return f"-{number}" if match[1] == "-" and number != "0" else number
