"""Brings answers that are written differently and mean the same to one form."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata

from mgrpo.grading.bases import spell_base
from mgrpo.grading.choices import mark_choice
from mgrpo.grading.decimals import (
    DOTTED,
    EXPONENT,
    REPEATING,
    make_fraction,
    normalize_number,
    spell_dotted,
    spell_exponent,
    spell_repeating,
)
from mgrpo.grading.markup import apply_rules, compile_rules, strip_markup
from mgrpo.grading.phrases import drop_phrase
from mgrpo.grading.units import UNIT_LETTERS, is_unit, spell_scale

MAX_ANSWER_CHARS = 1000
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁱⁿ]+")
_SUBSCRIPTS = re.compile("[₀-₉₊₋₍₎]+")
_VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞↉]")
_BAR_OR_DOT = re.compile("((?:[0-9][\u0304\u0305])+)|([0-9])\u0307")
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
        "≈": r"\approx ",
        "≃": r"\approx ",
        "≅": r"\cong ",
        "∼": r"\sim ",  # noqa: RUF001
        "→": r"\to ",
        "⟹": r"\Rightarrow ",
        "➜": r"\to ",
        "⟶": r"\to ",
        "⇒": r"\Rightarrow ",
        "∴": r"\therefore ",
        "≒": r"\approx ",
        "≡": r"\equiv ",
        "∅": r"\emptyset ",
        "∈": r"\in ",
        "∪": r"\cup ",  # noqa: RUF001
        "∩": r"\cap ",
        "∧": r"\land ",
        "≠": r"\ne ",
        "±": r"\pm ",
        "…": r"\ldots ",
        "\u066b": ".",
        "\u066c": ",",
        "~": " ",
    }
)
_DOUBLE_STRUCK = re.compile("[\u2102\u2115\u211a\u211d\u2124]")
# A dash before a number, unless it is a range.
_DASH = re.compile(r"(?<![^\s=,;(\[{])[\u2010-\u2013](?=[0-9.\\])")
_GREEK_NAMES = dict(
    zip(
        "αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΦΨΩ",
        (
            "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi "
            "psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
        ).split(),
        strict=True,
    )
)
# Single letters; those of a Greek word stay.
_GREEK = re.compile("(?<![\u0370-\u03ff])[α-ωΓΔΘΛΞΠΣΦΨΩ](?![\u0370-\u03ff])")  # noqa: RUF001
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")


_FONTS = (
    "text(?:normal|bf|it|rm|sf|tt|sc|md|up|sl)?|math(?:bf|it|rm|sf|tt|normal|ord|up)|boldsymbol|bold|bm|pmb|mbox|hbox|"
    "fbox|framebox|makebox|boxed|bbox|underline|uline|uuline|uwave|sout|textlf|math(?:sfit|bfsf|bfup)|underbrace|overbrace|emph|hl|ensuremath|colorbox|smash|"
    "[lr]lap|clap|math(?:clap|[lr]lap|op|rel|bin|inner|open|close|punct)|sym(?:bf|up|rm|it|sf)"
)
_SWITCHES = (
    "displaystyle|textstyle|scriptstyle|scriptscriptstyle|tiny|scriptsize|footnotesize|small|normalsize|large|Large|"
    "LARGE|huge|Huge|bf|it|rm|sf|tt|sc|em|bfseries|itshape|rmfamily|sffamily|ttfamily|mdseries|upshape|normalfont|"
    "bold|cal|frak|scr|sl|relax|null|leavevmode|boldmath|unboldmath|centering|noindent|limits|nolimits|strut|mathstrut|left|right|middle|[bB]igg?[lrm]?"
)
_SPACES = (
    "q?quad|enspace|thinspace|medspace|thickspace|neg(?:thin|med|thick)space|nobreakspace|space|hfill|hfil|allowbreak"
)
_UNIT_WRAPPERS = r"\\(?:text(?:normal|bf|it|rm|sf|up)?|math(?:bf|it|rm|sf|up)|mbox|hbox|operatorname\*?)"
_TEXT = re.compile(_UNIT_WRAPPERS + r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
# Text that may follow the first part of a unit: exponents, separators, further wrappers.
_REST_OF_UNIT = re.compile(
    r"(?:\s|[/*.()]|\\(?:cdot|times|l?dots|,|;|:|!|\\)|(?:\^|\*\*)\s*(?:\{\s*[+-]?\s*[0-9]\s*\}|[+-]?[0-9])|"
    + _UNIT_WRAPPERS
    + r"\s*\{(?:[^{}]|\{[^{}]*\})*\})*[.,;}]*\s*"
)
_VALUE_BEFORE_UNIT = re.compile(r"(?:[0-9)\]}!%./'^]|\\(?:pi|infty|cdot|circ|mu|frac\{|[,;:!]))\s*\Z")
_LOGIC = re.compile(
    r"\b(?:and|or|if|when|where|is|are|not|mod|than|to|but|hundred|thousand|million|billion|trillion|dozen|percent|percentage|pct)\b",
    re.IGNORECASE,
)
_MERIDIEM = re.compile(r"\s*([ap])\.?\s*m\.?\s*", re.IGNORECASE)

_ENDS = (
    r".,;:?\u3001\u3002\uff0c\uff0e\uff61\uff64\u060c\u061b\u061f\u06d4\u0964\u0965\u0589\u1362\u104a\u104b\u17d4\u2026"
)


def _mark_bare_unit(match: re.Match[str]) -> str:
    r"""Marks letters after a space as \unit{}, because the space is removed later."""
    value = re.sub(r"\\(?:[dtc]?frac|sqrt|times|cdot|pi|left|right|,|!)(?![A-Za-z])", "", match.string[: match.start()])
    if re.search(r"[A-Za-z]", value.partition("=")[2] or value) or not is_unit(match[1], after_digit=True):
        return match[0]
    return rf"\unit{{{match[1]}}}"


_REWRITES = compile_rules(
    (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"∛\s*\(?([0-9]+|[A-Za-z])\)?", r"\\sqrt[3]{\1}"),
    (r"√\s*([0-9]+|[A-Za-z])|\\sqrt\s*([0-9]+)", r"\\sqrt{\1\2}"),
    (r"(?<=[0-9])_(?=[0-9]{3}(?![0-9]))", ","),
    (
        r"(?<![0-9])([0-9]+)(?:\{,\}(?![0-9]{3}(?![0-9]))|(?<=(?<![0-9])0)\{,\}|,(?=[0-9]*(?:\\overline|\([0-9]+\)$)))",
        r"\1.",
    ),
    (r"\\?\$", ""),
    (r"\\%", "%"),
    (r"\\(?:left|right)(?![A-Za-z])\.?", ""),
    (r"\\[dtc]frac(?![A-Za-z])|\\(?:nice|s|flat)frac(?![A-Za-z])", r"\\frac"),
    (r"(?<=[0-9])(?:\\[,!]|\{,\}|['’])(?=[0-9]{3}(?![0-9]))", ","),  # noqa: RUF001
    (
        r"^([+-]?[0-9]{1,3})((?:\.[0-9]{3})+),([0-9]{1,2}|[0-9]{4,})$|^([+-]?[0-9]{1,3}(?:\.[0-9]{3}){2,})$",
        # 1.234,5 and 1.234.567, but not 1.234
        lambda match: match[4].replace(".", "") if match[4] else f"{match[1]}{match[2].replace('.', '')}.{match[3]}",
    ),
    (r"\\!", ""),
    (r"(?<!\\)\\[()\[\]]", " "),
    (r"(?<![^\s(])\*\*(?=\S)([^*]+)(?<=\S)\*\*(?![^\s.,;:)%])", r"\1"),
    (r"^[\s*`:&]+|[\s*`&]+$", ""),
    (r"[\"“”„«»]", ""),
    (r"^['‘]([^'‘’]*)['’]$", r"\1"),  # noqa: RUF001
    (r"^__+([^_].*?)__+$", r"\1"),
    (rf"\\(?:{_SPACES})(?![A-Za-z])|\\[hv]space\*?\s*\{{[^{{}}]*\}}|(?<!\\)\\[,;:>\s]", " "),
    (r"\\(?:[hv]?phantom|tag\*?|label)\s*\{[^{}]*\}", ""),
    (
        r"\\f?colorbox\s*(?:\{[^{}]*\}\s*)+(?=\{)|\\(?:text)?color\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}|\\bbox\s*\[[^\]]*\]",
        "",
    ),
    (r"\{\s*\\(?:rm|bf|it)\s+((?:[^{}]|\{[^{}]*\})*)\}", r"\\text{\1}"),
    (
        r"\\(?:text)?degrees?(?![A-Za-z])|(?<=[0-9])\s*\^\s*(?:o|\{\s*o\s*\}|\\text\s*\{\s*o\s*\})(?![A-Za-z])",
        r"^\\circ ",
    ),
    (r"(?<=[0-9)])\{\}(?=\s*\^)", ""),
    (r"\\textsuperscript\s*(?=\{)", "^"),
    (r"\\frac\s*([0-9])(?=\s*[0-9{])", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
    (r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{(?:[^{}]|\{[^{}]*\})*\}", r"\1 \\unit{unit}"),
    (r"\\num\s*\{([^{}]*)\}", r"\1"),
    (r"\\text\s*\{\s*\(?(repeating|recurring)\)?\s*\}", r" \1 "),
    (r"(\\(?:overline|bar)\s*\{[0-9]+\}|[0-9.]+\([0-9]+\))\s*\(?(?:repeating|recurring)\)?\s*$", r"\1"),
)
_UNWRAPS = compile_rules(
    (rf"\\(?:{_FONTS})\s*\{{([^{{}}]*)\}}", r" \1 "),
    (rf"\\(?:{_FONTS})\s*(?=\{{[^{{}}]*\{{)", ""),
    (r"\\(?:mathbf|mathrm|mathit|boldsymbol|bm)\s*([0-9])", r" \1"),
    (rf"\\(?:{_SWITCHES})(?![A-Za-z])", " "),
    (r"^\s*\{?([^{}]*[^{}\s])\s*\\over(?![A-Za-z])\s*([^{}]+)\}?\s*$", r"\\frac{\1}{\2}"),
    (r"^\s*\{?([^{}]*[^{}\s])\s*\\choose(?![A-Za-z])\s*([^{}]+)\}?\s*$", r"\\binom{\1}{\2}"),
    (r"\\([lg]e|ne)(?:q|qq|qslant)?(?![A-Za-z]) ?", r"\\\1 "),
    (r"\\mathbb\s*([A-Z])(?![A-Za-z])", r"\\mathbb{\1}"),
    (r"(?<=[0-9])\s*(?:[xX*]|\\cdot|\\times)\s*(?=10\s*(?:\^|\*\*))", r"\\times "),
    (r"(?i)\s*(?:\bper ?cent|\bpercentage|\bpct)\s*$", "%"),
    (r"%[\s%]*%", "%"),
    (r"(?<=[)\]}%!]) +((?:[A-Za-z]|\\(?:mu|Omega)).*)$", _mark_bare_unit),
    (r"(?<=[0-9}]) *\[([A-Za-z\\][^\[\]]*)\]$", _mark_bare_unit),
    (r"(?<=[0-9]) ([ei])(?![A-Za-z])", r"\1"),
    (r"(?<=[\w}%)\]])\s*(?:\(\s*)?(?<![A-Za-z])(?:approx(?:imately|\.)?|exact(?:ly)?|rounded)\s*\)?\s*$", ""),
    (
        r"(?<=[\w}%)\]])\s*\(\s*(?:rounded|correct to|nearest|(?:to )?[0-9]+ ?"
        r"(?:s\.? ?f|d\.? ?p|sig|decimal places))[^()]*\)\s*$",
        "",
    ),
    (r"\s+", " "),
    (r" ?([^A-Za-z0-9 ]) ?", r"\1"),
    (r"^(-?[0-9]+) ([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}"),
    (
        r"^(?:=+>|-+>|:?=|:|\\(?:approx|approxeq|simeq|sim|cong|doteq|equiv|therefore|implies|to|triangleq|coloneqq|mapsto|"
        r"fallingdotseq|risingdotseq|thickapprox|asymp|backsimeq|leadsto|hookrightarrow|iff|Leftrightarrow|because|[Ll]ong(?:right)?arrow|"
        r"[Rr]ightarrow|Longrightarrow|longrightarrow)(?![A-Za-z]) ?)+",
        "",
    ),
    (r"\^([A-Za-z]|-?[0-9]+)(?![0-9A-Za-z.])", r"^{\1}"),
    (r"(?<!\\log)_(?:([0-9]+)(?![0-9.])|([A-Za-z])(?![0-9A-Za-z]))|(?<=\\log)_([0-9])(?![0-9])", r"_{\1\2\3}"),
    (r"\^\{\\circ ?\}", r"^\\circ"),
    (r"\\varnothing(?![A-Za-z])|\\\{ ?\\\}", r"\\emptyset "),
    (r"\\log_\{?e\}? ?", r"\\ln "),
    (r"\\lg(?![A-Za-z]) ?", r"\\log_{10}"),
    (r"\\(?:c|d)?dots[bcm]?(?![A-Za-z])|(?<=,)\.\.\.(?=,)", r"\\ldots "),
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
    (r"(?<![A-Za-z\\])[iI]nfinity(?![A-Za-z])", r"\\infty "),
    (r"(?<![A-Za-z\\])sqrt\s*([0-9]+)", r"\\sqrt{\1}"),
    (r"(?<=[A-Za-z)])\*\*([0-9]+)(?![0-9*])", r"^{\1}"),
    (r"(?i)^(yes|no|true|false)!+$", r"\1"),
    (r"(?i)(?<=[0-9]) ?(?:a()|p)\.?m\.?$", lambda match: " pm" if match[1] is None else " am"),
    (r"^([+-]?)(?:[€£¥₹₽₩₺₫฿₪]|USD|EUR|GBP|CNY|RMB|INR|Rs\.?|US|HK|NT) ?(?=[0-9.])", r"\1"),
    (r"(?<=[0-9]) ?[€£¥₹₽₩₺₫฿₪¢]$", ""),
    (r"(?<![A-Za-z\\}_^\]0-9)])\{([0-9.]+|[A-Za-z])\}", r"\1"),
    (
        r"\^(?:\{(?:st|nd|rd|th)\}|(?:st|nd|rd|th)\b)$"
        r"|(?:(?<=1)st|(?<=2)nd|(?<=3)rd|(?<=[0-9])th)(?=$| [a-z]{3,}$)",
        "",
    ),
    (
        rf"^\++|(?:\\\\|\\ldots|\\$|[{_ENDS} ])+$",
        # dots that continue a list stay
        lambda match: r",\ldots" if re.match(r" ?, ?(?:\\ldots|\.\.\.)", match[0]) else "",
    ),
)
_PARENTHESES = re.compile(r"(-?)(?:([0-9]+)\.()\(([0-9]+)\)|(0?)\.([0-9]+)\(([0-9]+)\))")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,(?![A-Za-z]))")
_OTHER_COMMA = re.compile(r",(?![A-Za-z](?:_\{?[0-9A-Za-z]\}?)?=)")


def canonicalize(answer: str) -> str:
    r"""Rewrites an answer to a canonical form: answers with equal forms are the same; deterministic and idempotent.

    Unicode is composed (NFKC; superscripts become powers, digits of any script ASCII), typography is removed (LaTeX
    spacing, `$`, \left, fonts, sizes, colours, bold stars, a leading sign for equal or about, a final comma or full
    stop), \dfrac becomes \frac with braces, a repeating decimal its exact fraction, and a plain number loses thousands
    separators, a plus sign, leading zeros, trailing decimal zeros and an exponent after e. An answer of more than 1,000
    characters is only stripped.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return answer.strip()
    return normalize_number(answer) or _canonicalize(answer)


@functools.lru_cache(maxsize=16384)
def _canonicalize(answer: str) -> str:
    """Repeats the rewrites until nothing changes, so that they are idempotent."""
    while (rewritten := _rewrite(answer)) != answer:
        answer = rewritten
    return answer


def _rewrite(text: str) -> str:
    """One pass over all rewrites."""
    text = mark_choice(strip_markup(_spell_symbols(text)))
    text = DOTTED.sub(spell_dotted, text)
    text = apply_rules(_REWRITES, text)
    text = _TEXT.sub(_mark_unit, text)
    text = apply_rules(_UNWRAPS, text)
    text = spell_base(drop_phrase(_strip_braces(text)))
    text = REPEATING.sub(spell_repeating, text)
    if match := _PARENTHESES.fullmatch(text):
        text = match[1] + make_fraction(match[2] or match[5], match[3] or match[6] or "", match[4] or match[7])
    text = EXPONENT.sub(spell_exponent, text)
    text = spell_scale(text)
    if "," in text and not re.search(r"[(\[]|\\\{", text) and not _OTHER_COMMA.search(_THOUSANDS.sub("", text)):
        text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    if text.endswith("%") and (percentage := normalize_number(text[:-1])):
        return percentage + "%"
    return normalize_number(text) or text


def _spell_symbols(text: str) -> str:
    """Unicode in ASCII and LaTeX."""
    if text.isascii():
        return text.replace("~", " ").strip()
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    # NFKC alone would turn x² into x2, log₂8 into log28 and 1½ into 11/2.
    text = _SUPERSCRIPTS.sub(r"^{\g<0>}", text)
    text = _SUBSCRIPTS.sub(r"_{\g<0>}", text)
    text = _VULGAR_FRACTION.sub(_spell_fraction, text)
    text = _BAR_OR_DOT.sub(_spell_mark, text)
    text = _DASH.sub("-", text.replace("\u00ba", "°"))
    text = _DOUBLE_STRUCK.sub(lambda match: rf"\mathbb{{{unicodedata.normalize('NFKC', match[0])}}}", text)
    text = unicodedata.normalize("NFKC", text).translate(_SYMBOLS)
    text = _GREEK.sub(lambda match: rf"\{_GREEK_NAMES[match[0]]} ", text)
    return _FOREIGN_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text).strip()


def _spell_fraction(match: re.Match[str]) -> str:
    """The LaTeX of a one-character fraction."""
    numerator, denominator = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _spell_mark(match: re.Match[str]) -> str:
    """The LaTeX of digits with a combining bar or dot."""
    return rf"\overline{{{match[1][::2]}}}" if match[1] else rf"\dot{{{match[2]}}}"


def _mark_unit(match: re.Match[str]) -> str:
    r"""The text behind a value: a known unit as plain text, another as \unit{}, to tell it from a product."""
    before, content = match.string[: match.start()].rstrip(" $"), " ".join(match[1].split())
    if before[-1:].isdigit() and (percent := re.match(r"\\?%\s*(?=\S)", content)):
        return rf"% \text{{{content[percent.end() :]}}}"
    if before[-1:].isdigit() and (meridiem := _MERIDIEM.fullmatch(content)):
        return f" {meridiem[1].lower()}m "
    meant = not re.search(r"[^\W\d_]", content) or _LOGIC.search(content)
    if meant or not _REST_OF_UNIT.fullmatch(match.string, match.end()):
        return _mark_inside(match)
    after_digit = re.search(r"(?<![0-9])(?<!\^)(?<!_)(?<!\^-)[0-9]+\Z", before) is not None
    known = is_unit(content, after_digit=after_digit)
    if not _VALUE_BEFORE_UNIT.search(before):
        # Behind letters only a known unit is one: n even stays.
        certain = known and re.search(r"(?<![A-Za-z])[A-Za-z]{1,2}\Z", before)
        return rf"\unit{{{content}}}" if certain else _mark_inside(match)
    if known:
        return f" {content} "
    letter = re.fullmatch(r"[A-Za-z]", content)
    return match[0] if letter and content not in UNIT_LETTERS else rf"\unit{{{content}}}"


def _mark_inside(match: re.Match[str]) -> str:
    """A wrapper that is no unit, with the units inside it marked."""
    command = match.string[match.start() : match.start(1)]
    return command + _TEXT.sub(_mark_unit, match[1]) + "}"


def _strip_braces(text: str) -> str:
    """Removes braces around the whole text."""
    while text.startswith("{") and text.endswith("}") and not text.endswith("\\}"):
        depths = itertools.accumulate((char == "{") - (char == "}") for char in text)
        if next(place for place, depth in enumerate([*depths, 0]) if depth == 0) != len(text) - 1:
            break
        text = text[1:-1].strip()
    return text
