"""Numbers with a base: as a subscript, in words, or as a prefix of programming languages."""

from __future__ import annotations

import re

_WORDS = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "sixteen": 16, "bin": 2, "binary": 2, "oct": 8, "octal": 8, "dec": 10, "decimal": 10, "hex": 16,
    "hexadecimal": 16,
}  # fmt: skip
_NAMES = "|".join(sorted(_WORDS, key=len, reverse=True))
_PREFIXES = {"b": 2, "o": 8, "x": 16}
_PREFIXED = re.compile(r"^(-?)0([bB](?=[01]+$)|[oO](?=[0-7]+$)|[xX])([0-9A-Fa-f]+)$")
_SPELLED = re.compile(
    r"(?<=[0-9A-F)])(?: ?_?\{?\(?(?: ?(?:in|to) )? ?base[ -]?\{?([0-9]{1,2}|"
    + _NAMES
    + r")\}?\)?\}?|_\{?("
    + _NAMES
    + r")\}?)(?![A-Za-z0-9])"
)
_WRAPPED = re.compile(
    r"\\(?:text|textbf|mathrm|mbox|unit)\s*\{[\s~(]*(?:(?:in|to) )?base[ -]?([0-9]{1,2}|" + _NAMES + r")[\s~)]*\}"
)
_OVERLINED = re.compile(r"(?<![0-9.])\\overline\{([0-9A-F]+)\}(?=_)")
_GROUPED = re.compile(r"(?<![0-9A-Za-z.,(\\])[0-9A-F]+(?:[ ,][0-9A-F]+)+(?=_)")
_DIGITS = r"(?:[0-9][0-9A-Fa-f]*(?:\.[0-9A-Fa-f]+)?|[A-F][0-9A-F]*(?=\)?_\{?1[1-6]))"
_SUBSCRIPT = r"_(?:\{\(?([0-9]+)\)?\}|([0-9]))"
_WHOLE = re.compile(rf"(-?)\(?(-?)({_DIGITS})\)?{_SUBSCRIPT}")
_INSIDE = re.compile(rf"(?:(?<![A-Za-z0-9.\\}}])|(?<=\\cdot)|(?<=\\times))\(?({_DIGITS})\)?{_SUBSCRIPT}(?![0-9])")
_NAMED = re.compile(r"(?<=[0-9)])_\{([A-Za-z]+)\}")
_BARE = re.compile(r"-?(?:[0-9][0-9A-Fa-f]*(?:\.[0-9A-Fa-f]+)?|[A-F][0-9A-F]*)")


def spell_base(text: str) -> str:
    """Writes 234 base 5, 234_five and 0x1F as 234_{5} and 1F_{16}."""
    if match := _PREFIXED.match(text):
        return f"{match[1]}{match[3]}_{{{_PREFIXES[match[2].lower()]}}}"
    if "base" not in text and "_" not in text:
        return text
    text = _WRAPPED.sub(lambda match: f"_{{{_number(match[1])}}}", text)
    text = _SPELLED.sub(lambda match: f"_{{{_number(match[1] or match[2])}}}", text)
    text = _OVERLINED.sub(r"\1", text)
    return _GROUPED.sub(lambda match: re.sub("[ ,]", "", match[0]), text)


def has_base(form: str) -> bool:
    """Whether a number in the form is written with its base."""
    return "_" in form and _INSIDE.search(form) is not None


def align_bases(first: str, second: str) -> tuple[str, str] | None:
    """Two forms without the bases that both have; None where the bases differ."""
    if "_" not in first and "_" not in second:
        return first, second
    one, other = _WHOLE.fullmatch(first), _WHOLE.fullmatch(second)
    if one and other:
        return None if _base(one) != _base(other) else (_digits(one), _digits(other))
    if one and _BARE.fullmatch(second):
        return _digits(one), second
    if other and _BARE.fullmatch(first):
        return first, _digits(other)
    bases, bases_too = ({int(match[2] or match[3]) for match in _INSIDE.finditer(form)} for form in (first, second))
    names, names_too = (set(_NAMED.findall(form)) for form in (first, second))
    if names and names_too and names != names_too:
        return None
    if not (bases and bases_too):
        return first, second
    if bases != bases_too:
        return None
    if len(bases) > 1:
        return first, second
    first, second = (_INSIDE.sub(lambda match: match[1].upper(), form) for form in (first, second))
    return first, second


def _number(name: str) -> int:
    """The base of a name."""
    return _WORDS.get(name) or int(name)


def _base(match: re.Match[str]) -> int:
    """The base of a whole form."""
    return int(match[4] or match[5])


def _digits(match: re.Match[str]) -> str:
    """The sign and digits of a whole form."""
    return (match[1] or match[2]) + (match[3].upper().lstrip("0") or "0")
