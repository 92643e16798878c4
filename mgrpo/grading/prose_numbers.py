"""Finds the last number in prose, with its sign, fraction, power or root."""

from __future__ import annotations

import re
import unicodedata

_SEPARATOR = r"(?P<separator>,|\{,\}|\\,|[ '’\u00a0\u2009\u202f])"  # noqa: RUF001
_DIGITS = (
    rf"(?:[0-9]{{1,3}}(?:(?:\.[0-9]{{3}})+,[0-9]+(?![0-9,])|(?:\.[0-9]{{3}}){{2,}}(?![0-9.]))|[0-9]{{1,3}}{_SEPARATOR}[0-9]{{3}}(?![0-9])(?:(?P=separator)[0-9]{{3}}(?![0-9]))*|[0-9]+)"
    r"(?:\.[0-9]*(?:\\(?:overline|bar|dot) ?\{?[0-9]+\}?[0-9]*)+|\.[0-9]*\([0-9]+\)(?!\w)"
    r"|\.[0-9]{3,}(?:\.\.\.|…|\\l?dots(?![a-z]))|(?:\.[0-9]+)?(?::[0-9]+(?:\.[0-9]+)?)*)"
    r"|(?<![0-9])\.[0-9]+"
)
_INTEGER_POWER = r"(?:\{ ?[+\-\u2212]?[0-9./]{1,20} ?\}|\(?[+\-\u2212]?[0-9]{1,20}\)?)"
_RAISED = r"(?:\^|(?<=[\w)\]}])\*\*(?![0-9.,]+\*\*))"
_POWER = rf"(?: ?{_RAISED} ?{_INTEGER_POWER}|[⁰¹²³⁴-⁹⁺⁻]+)"
_GROUP = r"\{(?:[^{}]|\{[^{}]{0,60}\}){0,60}\}"
_FRACTION = rf"\\[dtc]?frac ?(?:{_GROUP}|[0-9]) ?(?:{_GROUP}|[0-9])"
_ROOT = r"(?:\\sqrt(?:\[[0-9]+\])? ?(?:\{[0-9 +\-*/^.]{1,40}\}|[0-9])|√ ?(?:[0-9]+|\([0-9]+\)))(?:/[0-9]+(?![0-9]))?"
_ELEMENT = "(?:H|He|Li|Be|B|C|N|O|F|Ne|Na|Mg|Al|Si|P|S|Cl|Ar|K|Ca|Cr|Mn|Fe|Co|Ni|Cu|Zn|Br|Ag|Sn|I|Ba|Pt|Au|Hg|Pb|U)"
# Powers of units and counts of atoms are not separate numbers.
_FORMULA = rf"(?<![A-Za-z0-9])(?:(?:{_ELEMENT}_?(?:[0-9]+|\{{[0-9]+\}})?){{2,}}|(?:H|N|O|F|Cl|Br|I)_?2)(?![A-Za-z0-9])"
_LAST_NUMBER = re.compile(
    # Fractions of letters, exponents, indices and units are not separate numbers.
    r"\\[dtc]?frac ?\{[^{}0-9]{0,60}\} ?\{[^{}0-9]{0,60}\}"
    rf"|(?:{_RAISED}|(?<=[A-Za-z0-9)}}\]])_) ?(?:{_GROUP}|{_INTEGER_POWER})|{_FORMULA}"
    r"|(?<![A-Za-z])(?:[kcdm]?m|ft|in|yd|mi|sec|s)[23](?![0-9])"
    r"|(?P<number>(?:(?<![\w)\]}])[+\-\u2212\u2013](?=[\\0-9.¼-⅞√])|(?<=[=:] )[\-\u2212] (?=[\\0-9]))?"
    rf"(?:{_FRACTION}|{_ROOT}"
    rf"|(?:{_DIGITS})(?:[eE][+\-\u2212]?[0-9]+(?![A-Za-z0-9])"
    rf"| ?(?:\\times|\\cdot|[×·*xX]) ?10{_POWER}"  # noqa: RUF001
    rf"| ?[/\u2044] ?[0-9]+(?![0-9])| [0-9]+/[0-9]+| ?{_FRACTION}| ?[¼-¾⅐-⅞]"
    rf"|_(?:\{{[0-9]+\}}|[0-9]+)|{_POWER}| ?{_ROOT})?"
    r"|[¼-¾⅐-⅞])(?: ?(?:\\pi(?![A-Za-z])|π))?(?:(?<=[^0-9])/[0-9]+)?|(?:\\pi|π) ?/ ?[0-9]+)"
)


_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d|(?<=\d)[\uff0c\uff0e](?=\d)")


def _spell_digit(match: re.Match[str]) -> str:
    """A digit, comma or full stop in ASCII."""
    return unicodedata.normalize("NFKC", match[0]) if not match[0].isdecimal() else str(unicodedata.decimal(match[0]))


def find_last_number(text: str) -> str | None:
    """The last number that is no exponent, index or unit."""
    last = None
    if not text.isascii():
        text = _FOREIGN_DIGIT.sub(_spell_digit, text)
    for match in _LAST_NUMBER.finditer(text):
        last = match["number"] or last
    return last
