"""Brings decimals to one notation: plain ones, repeating ones, and those with a power of ten."""

from __future__ import annotations

import re
from fractions import Fraction

# A number with a larger exponent is not written out.
MAX_PLAIN_EXPONENT = 20
_NUMBER = re.compile(r"([+-]?)([0-9]{1,3}(?:[ ,][0-9]{3})+|[0-9]*)(?:\.([0-9]*))?")
_DIGITS = r"(?:(?<![A-Za-z0-9\\.}])|(?<=\\times)|(?<=\\cdot))([0-9]*)\.([0-9]*)"
REPEATING = re.compile(
    _DIGITS + r"(?:\\(?:overline|bar|overbar|widebar)\s*(?:\{([0-9]+)\}|([0-9]))"
    r"|((?:\\dot\s*(?:\{[0-9]\}|[0-9])){3,})|\\dot\s*\{?([0-9])\}?(?:([0-9]*)\\dot\s*\{?([0-9])\}?)?)(?![0-9.]|\\dot)"
)
# 0.333... but not 2.718281828...: one digit three times, or more digits twice right after the point, else three times.
DOTTED = re.compile(_DIGITS + r"\s*(?:\\[lc]?dots(?![a-z])|\.\.\.|\(?((?:repeating|recurring)(?![a-z]))\)?)\s*")
_PERIOD = re.compile(r"([0-9]*?)([0-9])\2\2+|()([0-9]{2,})\4+|([0-9]*?)([0-9]{2,})\6\6+")
EXPONENT = re.compile(
    r"(?<![^=,;(\[{ ])([+-]?)([0-9]+\.?[0-9]*|\.[0-9]+)(?: ?(e|E) ?)"
    r"(?:\{([+-]?)([0-9]{1,9})\}|([+-]?)([0-9]{1,9}))(?![^,;)\] %}\\/*+-])"
)


def spell_repeating(match: re.Match[str]) -> str:
    """The exact fraction of a decimal whose last digits are under a bar or between two dots."""
    whole, prefix, bar, bar_digit, dotted, first, inner, last = match.groups()
    period = bar or bar_digit or (dotted and re.sub("[^0-9]", "", dotted)) or first + (inner or "") + (last or "")
    return make_fraction(whole, prefix, period)


def spell_dotted(match: re.Match[str]) -> str:
    """The exact fraction of a decimal that shows its period and ends in dots; others are unchanged."""
    whole, decimals, word = match.groups()
    period = _PERIOD.fullmatch(decimals) or (word and re.fullmatch("()([0-9])", decimals))
    if not period:
        return match[0]
    return make_fraction(whole, *(group for group in period.groups() if group is not None))


def make_fraction(whole: str, prefix: str, period: str) -> str:
    """The LaTeX of WHOLE.PREFIX(PERIOD)."""
    value = Fraction(int(whole + prefix + period or "0") - int(whole + prefix or "0"), 10 ** len(period) - 1)
    value /= 10 ** len(prefix)
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def spell_exponent(match: re.Match[str]) -> str:
    """A number with e as a decimal or with a power of ten; 2e-3 and 2e+3, maybe sums with Euler's number, stay."""
    sign, mantissa, letter, *exponents = match.groups()
    exponent_sign, digits = exponents[:2] if exponents[1] else exponents[2:]
    if letter == "e" and exponent_sign and "." not in mantissa and mantissa != "1":
        return match[0]
    exponent = int(exponent_sign + digits)
    if abs(exponent) > MAX_PLAIN_EXPONENT:
        return rf"{sign}{normalize_number(mantissa)}\times 10^{{{exponent}}}"
    whole, _, decimals = mantissa.partition(".")
    number, places = whole + decimals, len(decimals) - exponent
    if places <= 0:
        return sign + number + "0" * -places
    number = number.rjust(places + 1, "0")
    return f"{sign}{number[:-places]}.{number[-places:]}"


def normalize_number(text: str) -> str | None:
    """The shortest decimal notation of a plain number, None for any other text."""
    match = _NUMBER.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        return None
    whole = match[2].replace(",", "").replace(" ", "").lstrip("0") or "0"
    decimals = (match[3] or "").rstrip("0")
    number = f"{whole}.{decimals}" if decimals else whole
    return f"-{number}" if match[1] == "-" and number != "0" else number
