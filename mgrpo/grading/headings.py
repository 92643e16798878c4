"""Finds the answer behind ####, which markdown also uses for headings."""

from __future__ import annotations

import re

# Headings that are tried, from the end of the text.
MAX_HEADINGS = 20
_LABEL = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the |my |our )?(?:final |correct )?"
    r"(?:answer|result|solution|conclusion|total|summary)"
    r"(?: (?:is|equals)(?![a-z])|[ *_]*[:=])[ *_:]*",
    re.IGNORECASE,
)
# 3. Final Answer, (b) Answer and Step 4: the result are headings of answers despite their numbers.
_NUMBER_OF_LABEL = re.compile(
    r"^(?:\(?(?:[0-9]{1,2}|[a-z])[.)]|(?:step|part) ?[0-9]{1,2}[:.)])[ *_]*"
    r"(?=(?:so|thus|hence|therefore,? )?(?:the |my |our )?(?:final |correct )?(?:answer|result|solution|conclusion)\b)",
    re.IGNORECASE,
)
_MATHS = re.compile(r"[0-9$=^]|\\[A-Za-z(\[]|[¼-¾⅐-⅞∞π√∅]")
_NUMBERED = re.compile(
    r"(?:step|part|case|method|problem|question|section|example|approach|solution|phase|stage)s? *#?[0-9]+"
    r"(?![0-9]*[.,]?[0-9])"
    r"|[0-9]{1,2}[.)] +[^\W\d_]{2,}"
    r"|(?:(?:let's|let us|we|how to|now|first|next),? )?(?:calculat|comput|determin|identify|understand|analy[sz]|"
    r"simplif|evaluat|verif|substitut|multipl|subtract|divid|convert|combin|express|break)[a-z]* [^=]*"
    r"|(?:find|solv|check|count|apply|add|consider|recall|defin|set|us|given|plug)(?:e|ing|ting)? (?![=]).*",
    re.IGNORECASE,
)
# Headings if text follows below, else answers.
_SECTION = re.compile(
    r"(?:day|week|month|year|round|level|scenario|figure|table|equation|task|exercise|item|point|quarter|trial|for)s? "
    r"[^=]*[0-9]+[^=]*",
    re.IGNORECASE,
)
_BULLET = re.compile(r"^\s*(?:[-+\u2022]|[0-9]{1,2}[.)])\s+")
_SHORT_ANSWER = re.compile(
    r"yes|no|true|false|none|\(?[A-J]\)?|[A-Z]{1,2}|(?:no|infinitely many) solutions?", re.IGNORECASE
)
_HEADING_WORDS = re.compile(
    r"(?<![a-z])(?:answers?|solutions?|conclusion|results?|summary|explanation|final|steps?|verification|check|notes?|"
    r"analysis|reasoning|overview|calculations?|computation|proof|discussion|remarks?|approach|therefore)(?![a-z])",
    re.IGNORECASE,
)
_ANNOUNCES = re.compile(
    r"|.*(?<![a-z])(?:answer|solution|conclusion|result|summary|final|total|therefore)s?(?![a-z]).*", re.I
)
_WORD = re.compile(r"\w")
_LINE_END = re.compile(r"[\r\n]")


def find_hash(text: str) -> str | None:
    """The answer after the last #### that is no plain heading."""
    end, under_another = len(text), None
    for _ in range(MAX_HEADINGS):
        marker = text.rfind("####", 0, end)
        if marker < 0:
            break
        line_end = _find_line_end(text, marker, end)
        line = text[marker + 4 : line_end]
        rest, below = _clean(line), _find_below(text, line_end, end)
        leads = below and (line.rstrip(" *_").endswith(":") or _SECTION.fullmatch(rest))
        is_numbered = _NUMBERED.match(rest) is not None
        if not leads and not is_numbered and (_MATHS.search(rest) or _SHORT_ANSWER.fullmatch(rest)):
            return rest
        if below and _ANNOUNCES.fullmatch(rest):
            return below
        under_another = under_another or below
        if not below and 1 <= len(rest.split()) <= 3 and not is_numbered and not _HEADING_WORDS.search(rest):
            return rest
        end = marker
    return under_another


def _find_line_end(text: str, start: int, end: int) -> int:
    """The end of the line that contains `start`."""
    match = _LINE_END.search(text, start, end)
    return match.start() if match else end


def _find_below(text: str, start: int, end: int) -> str | None:
    """The next non-empty line that is no heading."""
    while match := _WORD.search(text, start, end):
        line_start = 1 + max(text.rfind("\n", start, match.start()), text.rfind("\r", start, match.start()), start - 1)
        start = _find_line_end(text, match.start(), end)
        line = text[line_start:start].strip()
        if not line.startswith("#") and (line := _clean(_BULLET.sub("", line))):
            return line
    return None


def _clean(line: str) -> str:
    """A line without the stars and hashes around it and without words that announce an answer."""
    line = line.lstrip(" \t*_#`:>").rstrip(" \t*_#`:").removesuffix("\\\\")
    line = _NUMBER_OF_LABEL.sub("", line)
    label = _LABEL.match(line)
    return line[label.end() :].strip(" \t*_`") if label else line
