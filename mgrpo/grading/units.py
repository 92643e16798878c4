r"""Drops units and other words behind a value, so that values are compared without them.

Forms come from `canonicalize`, where \unit{...} marks text whose letters alone could also be a product.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

MAX_UNIT_CHARS = 300
# Letters that are a unit where they are typeset as text; others stay variables.
UNIT_LETTERS = frozenset("msghlLNJWVAKCFTHMtdDSu")

_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SCALE = re.compile(rf"(?<![0-9.,}}/])([0-9]+)(?:\.([0-9]+))? ?({'|'.join(_SCALES)})(?![A-Za-z])")

_SHORT = (
    "kg|gm|gms|mg|cm|mm|km|nm|dm|ml|mL|ms|ns|kW|MW|kWh|Wh|kN|Nm|kJ|MJ|kV|mV|mA|MHz|GHz|kHz|THz|Hz|Pa|kPa|MPa|hPa|eV|"
    "keV|MeV|GeV|kB|MB|GB|TB|mol|cal|kcal|kgs|kms|cms|in|ft|yd|yds|mi|mph|kmh|kph|kmph|mpg|rpm|fps|sec|secs|min|mins|"
    "hr|hrs|day|days|wk|wks|yr|yrs|mo|mos|lb|lbs|oz|ton|tons|gal|qt|qts|pt|pts|cup|cups|cc|ha|deg|rad|sq|cu|atm|bar|"
    "psi|amu|dB|hp|mmHg|mt|mtr|mtrs|USD|EUR|GBP|CNY|INR|Rs|rs|yen|fl|au|ly|pc|nC|mC|kHz|mW|GW|kmol|mmol|rev|ppm|ppb|Km|KM|Kms|CM|Cm|Kg|KG|MM|Hrs|Mins|US"
)
# Units that may touch their number. 3ab, 60t, 2mg and 5m are products.
_GLUED_SHORT = (
    "kg|kgs|cm|cms|mm|km|kms|ml|mL|kW|kWh|kN|kJ|MHz|GHz|kHz|THz|Hz|kPa|MPa|hPa|eV|keV|MeV|GeV|mol|kcal|ft|mph|kmh|kph|"
    "kmph|mpg|rpm|fps|sec|secs|min|mins|hr|hrs|days?|yrs?|lbs?|oz|tons?|gal|cups?|mmHg|USD|EUR|GBP|CNY|INR|yen"
)
_WORDS = (
    "ohms?|bits?|inch|inches|feet|foot|miles?|units?|years?|hours?|months?|weeks?|minutes?|seconds?|degrees?|yards?|"
    "(?:kilo|centi|milli)?(?:meters?|metres?|grams?|liters?|litres?)|gallons?|pounds?|ounces?|dollars?|cents?|square|"
    "old|cubic|people|students?|men|man|boys?|toys?|ways?|cows?|hens?|eggs?|pies?|pens?|bags?|box|boxes|cars?"
)
_LETTERS = "[mgshlLNJWVK]"
_BAR = r"(?<![A-Za-z\\])"
_KNOWN = rf"{_BAR}(?:{_SHORT}|{_WORDS})(?![A-Za-z])"
_GLUED = (
    rf"{_BAR}(?:(?:{_GLUED_SHORT}|{_WORDS})(?![A-Za-z])|(?:m/s|g/mol|g/(?=cm|m[lL]))(?![a-z])"
    rf"|(?<=/)(?:{_WORDS})(?![A-Za-z]))"
)
_MARKED = (
    r"\\unit\{(?:[^{}]|\{[^{}]*\})*\}|\\(?:Omega|ohm|Hz|AA)(?![A-Za-z])"
    r"|\\mu ?(?:\\unit\{[a-zA-Z]\}|[mgslLCFAVW](?![A-Za-z]))|[kM] ?\\Omega"
    r"|[MRL]_\{?\\(?:odot|oplus) ?\}?|\^\\circ ?(?:[CFKNSEW](?![A-Za-z]))?"
    r"|[^\W\d_a-zA-Z\u0370-\u03ff]+"
)
_LONG = rf"{_BAR}[A-Za-zÀ-ɏ][a-zà-ɏ'-]{{3,}}(?![A-Za-z])"
_POWER = r"(?:\.?\^(?:\{-?[0-9]\}|-?[0-9])|\*\*-?[0-9]|[23](?![0-9.]))?"
_LATER = rf"(?:{_KNOWN}|{_MARKED}|{_LONG}|{_BAR}[mgshlLNJWVKACFTHMDSuc](?![A-Za-z])){_POWER}"
_JOIN = r"(?:/\(?|\*|\\cdot ?|\\times ?|\.|-|\)|(?: per | a | an | of | the | in |  ?)(?=[A-Za-z\\]))"
_MORE = rf"(?:{_JOIN}?{_LATER})*\)?{_POWER}\.?"
_FIRST_OF_PRODUCT = rf"(?:{_KNOWN}|{_MARKED}|{_BAR}{_LETTERS}(?![A-Za-z])){_POWER}"
_FRACTION = rf"\\frac\{{{_FIRST_OF_PRODUCT}{_MORE}\}}\{{{_FIRST_OF_PRODUCT}{_MORE}\}}"
_END = r"(?=$|[,;)\]]|\\\}| (?:and|or) )"
_UNIT = re.compile(
    rf"(?:(?<=[0-9]) (?:{_BAR}{_LETTERS}(?![A-Za-z]){_POWER}|{_LONG}|\(?{_KNOWN}{_POWER}){_MORE}"
    r"|(?<=[0-9]) [ACFHMT]$"
    rf"|(?<=[0-9}}])/(?:{_WORDS}|min|sec|hr|day|kg|lb){_MORE}"
    rf"|(?<=[0-9}}])(?: ?per (?:{_KNOWN}|{_LONG})|-(?:{_WORDS})(?![A-Za-z])){_MORE}"
    rf"|(?<=[0-9}}]) ?of (?:an? |the )?(?:{_KNOWN}|{_LONG}){_MORE}"
    rf"|(?:(?<=[0-9}})\]%!' ])|(?<=\\pi)) ?(?:\(?(?:{_GLUED}|{_MARKED}){_POWER}{_MORE}|{_FRACTION})"
    rf"|(?<=%) ?{_LONG}{_MORE}|(?<=[A-Za-z.])\\unit\{{[^{{}}]*\}}{_POWER}{_MORE}){_END}"
)
# Words that change the value or make a statement of it.
_MEANT = re.compile(
    r"(?<![A-Za-z])(?:and|or|if|when|where|is|are|not|no|mod|than|to|but|with|plus|minus|times|over|root|pi|sqrt|"
    r"squared|cubed|choose|factorial|infinity|sin|cos|tan|log|ln|exp|base|half|halves|thirds?|quarters?|fourths?|"
    rf"fifths?|tenths?|remainder|repeating|recurring|"
    rf"January|February|March|April|May|June|July|August|September|October|November|December|{'|'.join(_SCALES)})(?![A-Za-z])"
)
# The direction of a quantity: 5 m/s north, 10% more. Where both answers give one, it must be the same.
_SENSES = (
    "north|south|east|west|northeast|northwest|southeast|southwest|left|right|upwards?|downwards?|inwards?|outwards?|"
    "clockwise|counter-?clockwise|anti-?clockwise|forwards?|backwards?|above|below|more|less|increases?d?|decreases?d?|"
    "profit|loss|gain|ahead|behind|before|after|older|younger|faster|slower|larger|smaller|BC|AD|BCE|CE"
)
_SENSE = re.compile(rf"(?<![A-Za-z])({_SENSES})(?![A-Za-z])|(?<=\^\\circ)(?: ?\\unit\{{)? ?([NSEW])(?![A-Za-z])")
_WITH_SENSE = re.compile(rf"(.*[^ ])(?:(?: |(?<=%))({_SENSES})|\^\\circ ?([NSEW]))", re.DOTALL)
_POWER_IN_WORDS = re.compile(r"(?<=[a-zA-Z] )(?:squared|cubed)(?![a-z])")
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|arc[a-z]+|log|ln|exp)(?![A-Za-z])")
_LEFT_OVER = re.compile(r"[0-9}] ?(?:(?<!\\)(?<![A-Za-z\\])[A-Za-z]{2,}|\\unit\{)")


@functools.lru_cache(maxsize=16384)
def drop_unit(form: str) -> str:
    """A canonical form without the units behind its values; unchanged if it has several quantities, as 5 ft 3 in."""
    if len(form) > MAX_UNIT_CHARS or not re.search(r"[0-9\\]|^-?[A-Za-z] ", form):
        return form

    def drop(match: re.Match[str]) -> str:
        text = match[0]
        if _MEANT.search(_POWER_IN_WORDS.sub("", text)) or ("circ" in text and _FUNCTION.search(form)):
            return text
        if sense := _SENSE.search(text):
            return f" {sense[1]}" if sense[1] else rf"^\circ {sense[2]}"
        return ")" * (text.count(")") - text.count("("))

    bare = _UNIT.sub(drop, form).strip(" .")
    if bare in (form, "") or _LEFT_OVER.search(split_sense(bare)[0]):
        return form.replace("\\unit{", "\\text{")
    return bare


def split_sense(form: str) -> tuple[str, str]:
    """A form without units, split from the direction of its quantity, which may be empty."""
    match = _WITH_SENSE.fullmatch(form)
    return (
        (match[1], (match[2] or match[3]).removesuffix("s")) if match and re.search("[0-9]", match[1]) else (form, "")
    )


def is_unit(text: str, *, after_digit: bool) -> bool:
    """Whether plain text behind a value is its unit, not the letters of a product."""
    text = re.sub(r" ?([^A-Za-z0-9 ]) ?", r"\1", text)
    value = "1 " if after_digit else r"\sqrt{2}"
    return not text.startswith("\\") and drop_unit(value + text) == value.strip()


def spell_scale(text: str) -> str:
    """Writes 3 million as 3000000."""

    def spell(match: re.Match[str]) -> str:
        value = Fraction(match[1] + "." + (match[2] or "0")) * _SCALES[match[3]]
        return str(value) if value.denominator == 1 else match[0]

    return _SCALE.sub(spell, text)
