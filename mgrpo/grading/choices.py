"""Reads the letter of a multiple-choice answer, with or without the text of the choice."""

from __future__ import annotations

import re

_GAP = r"(?:\s|~|\\[,;:! ]|\\q?quad(?![A-Za-z]))"
# Text that makes the letter a part of a formula or of a list.
_NO_TEXT = (
    r"(?!and(?![a-z])|or(?![a-z])|[-=^_*+<>'/|&,;!?.:)\]}]|[A-J](?![A-Za-z])"
    r"|\\(?:cdot|times|cap|cup|setminus|to|le|ge|Right|in|mathbf|mathrm|boldsymbol|bm|vec|textbf)(?![a-z])|\*\*[A-J])"
)
# **B** the dog and \textbf{B} the dog, whose letter would else be read as one of a formula.
_MARKED = re.compile(
    rf"^(?:(?:\*\*|__)\s*\(?([A-J])\)?[.:]?\s*(?:\*\*|__){_GAP}+"
    rf"|\{{\(([A-J])\)\}}{_GAP}*|\\(?:textbf|text)\s*\{{\s*([A-J])\s*\}}{_GAP}+){_NO_TEXT}(?=\S)"
)
# B - Paris, and a number or text behind a longer dash.
_DASHED = re.compile(r"^\(?([A-J])\)?\s+(?:-\s+(?=[^\W\d_]{2})|[\u2013\u2014]\s*(?![A-Z]$)(?=\S))")
# B. F = ma, where F is no choice.
_STATED = re.compile(r"^([A-J])[.)]\s+(?=[A-J]\s*=)")
_SIGNED = re.compile(r"^\(([A-J])\)\s+\+(?=[0-9])")
_WHOLE = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer):? ?)?(?:\(([A-J])\)|([A-J])(?:[.:)]|、(?![A-J](?![A-Za-z])))(?![A-J]=)"
    r"|【([A-J])】|\[([A-J])\](?=.))"
    r"(?![A-Z]$|[A-Z]\.|[A-J]:|[=^_*+<>'/|&;!]|\[[A-J]\]|,[A-J(\[]|,? ?(?:and|or)(?![a-z])"
    r"|\\(?:cdot|times|cap|cup|setminus|to|le|ge|Right|in)(?![a-z])|[-\u2013][A-J(](?![A-Za-z]))"
    r"(?!.*[,; ][A-J][.:)])"
    r"(?!(?!(?:[Bb]oth|[Ee]ither|[Nn]either|[Aa]ll|[Oo]nly|[Nn]one|\([A-J]\),? ?(?:and|or)\([A-J]\)$)).*\([A-J]\)).*"
    r"|(?:[Oo]ption|[Cc]hoice|[Aa]nswer):? ?([A-J])|<([A-J])>"
    r"|\(?([A-J])\)? ?is (?:the |my )?(?:(?:final )?answer|(?:correct|right|best)(?: (?:answer|choice|option))?)",
    re.DOTALL,
)


def mark_choice(text: str) -> str:
    """Puts the letter of a choice in parentheses where only fonts, dashes or spaces tell it from a factor."""
    match = _MARKED.match(text) or _DASHED.match(text) or _STATED.match(text) or _SIGNED.match(text)
    return f"({next(filter(None, match.groups()))}) {text[match.end() :]}" if match else text


def read_choice(form: str) -> str | None:
    """The letter of a form that is a choice, as (B), (B)12, B.12, B:12 and B)12; not (A)+1, (A)(B), J.K.Rowling."""
    match = _WHOLE.fullmatch(form)
    return next(filter(None, match.groups())) if match else None
