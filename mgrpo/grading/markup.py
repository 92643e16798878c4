"""Removes markup that does not change an answer: LaTeX environments and boxes, HTML tags, bullets and ticks."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable

Replacement = str | Callable[[re.Match[str]], str]


def compile_rules(*rules: tuple[str, Replacement]) -> list[tuple[re.Pattern[str], Replacement]]:
    """Compiles patterns, each with its replacement."""
    return [(re.compile(pattern, re.DOTALL), replacement) for pattern, replacement in rules]


def apply_rules(rules: Iterable[tuple[re.Pattern[str], Replacement]], text: str) -> str:
    """The text after each rule in turn."""
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


_ENTITY = re.compile(r"&(?:[A-Za-z]{2,8}[0-9]{0,2}|#[0-9]{1,6}|#x[0-9A-Fa-f]{1,5});")
_TAGS = (
    "b|strong|i|em|u|s|p|span|div|font|code|mark|center|big|small|math|box|answer|final_?answer|ans|final|result|"
    "solution|output|response|h[1-6]"
)
_ENVIRONMENTS = (
    "equation|align|aligned|alignat|gather|gathered|multline|split|math|displaymath|center|"
    "flushleft|eqnarray|large|huge"
)
_CURRENCIES = "pounds|yen|euro|rupee|(?:text|math)(?:sterling|euro|yen|won|dollar|rupee)|(?:text)?cents?"
# Commands whose first arguments style the last one.
_STYLED = r"\\(?:raisebox|scalebox|rotatebox|parbox|enclose|class|cssId|style|href|html[A-Z][a-z]+)"
_TOMBSTONES = "blacksquare|square|Box|qedsymbol|qedhere|qed|checkmark|hfill|nonumber|notag|newline|par|bigstar"
# Ticks, boxes, stars and pictures; the suits of cards are answers.
_PICTURES = (
    "\u2610-\u2612\u2605\u2606\u2705\u2713-\u2718\u274c\u2b50\u25a0-\u25a3\u25fb-\u25fe\u220e\ufe0f"
    "\U0001f300-\U0001faff"
)
_REWRITES = compile_rules(
    (rf"(?i)<({_TAGS})(?:\s[^<>]*)?>(.*?)</\1\s*>", r" \2 "),
    (r"(?i)<(?:br|hr)\s*/?>", " "),
    (r"(?i)<sup>([^<>]*)</sup>", r"^{\1}"),
    (r"(?i)<sub>([^<>]*)</sub>", r"_{\1}"),
    (
        rf"\\begin\s*\{{({_ENVIRONMENTS})(\*?)\}}(?:\{{[0-9]+\}})?((?:(?!\\begin|&).|&=|&)*?)\\end\s*\{{\1\2\}}",
        lambda match: f" {match[3].replace('&', ' ').strip().removesuffix(chr(92) * 2)} ",
    ),
    (r"\\begin\s*\{array\}\s*\{[^{}]*\}((?:(?!\\begin|&|\\\\).)*)\\end\s*\{array\}", r"\1"),
    (r"\\(?:framebox|makebox|raisebox|parbox)(?:\s*\[[^\[\]]*\])+\s*(?=\{)", r"\\mbox"),
    (rf"{_STYLED}\s*(?:\[[^\[\]]*\])?\s*\{{[^{{}}]*\}}\s*(?=\{{)", r"\\mbox"),
    (r"\\(?:under|over)set\s*\{\s*\}\s*(?=\{)", r"\\mbox"),
    (
        r"\\m?(?:kern|skip)\s*-?[0-9.]+ ?(?:pt|em|mu|cm|mm|ex)"
        r"|\\(?:mspace|footnote)\s*\{[^{}]*\}|(?:^|(?<=[0-9)]))\{\}",
        " ",
    ),
    (r"(?<![\w*\\)\]}])\*(?=[^\s*])([^*\n]+)(?<=[^\s*])\*(?![\w*(\\])", r"\1"),
    (r"\\resizebox\s*\{[^{}]*\}\s*\{[^{}]*\}\s*(?=\{)", r"\\mbox"),
    (r"\\unit\s*\[([^\[\]]*)\]\s*\{([^{}]*)\}", r"\1\\text{\2}"),
    (r"\\math(?:cal|bb|frak|scr)\s*(?:\{([0-9.,]+)\}|([0-9]))", r"\1\2"),
    (r"\\operatorname\*?\s*\{([^A-Za-z{}]*|[a-z])\}", r" \1 "),
    (r"\\(l|r)(brace|brack|paren)(?![A-Za-z])", lambda match: _BRACKETS[match[1] + match[2]]),
    (r"\\[lr]vert(?![A-Za-z])", "|"),
    (
        r"\\up(alpha|beta|gamma|delta|epsilon|theta|lambda|mu|pi|rho|sigma|tau|phi|chi|psi|omega)(?![A-Za-z])",
        r"\\\1",
    ),
    (r"\\(?:overset|stackrel)\s*\{\s*(?:\.|\\cdot|\\bullet)\s*\}\s*\{([0-9])\}", r"\\dot{\1}"),
    (
        r"(?<=[^\s])(?:\s|~|\\[,;:! ]|\\q?quad(?![A-Za-z]))*"
        rf"(?:\\(?:{_TOMBSTONES})(?![A-Za-z])\s*|[{_PICTURES}]\s*)+(?=[.,;\s\\$*)\]}}]*$)",
        "",
    ),
    (rf"^(?:\\checkmark(?![A-Za-z])|[{_PICTURES}\u2022\u2023\u25aa\u25cf\u25e6]|#{{1,6}} )\s*(?=\S)", ""),
    (r"^==(?=[^=])(.*[^=])==$", r"\1"),
    (rf"\\(?:{_CURRENCIES})(?![A-Za-z])(?:\{{\}})?\s*", ""),
    (r"^([+-]?)(?:[ARCS]|NZ|AU|CA|MX|SG)\\?\$\s*(?=[0-9.][^$]*$)", r"\1"),
    (r"\\mathcal\s*(?:\{O\}|O)(?=\s*(?:\\left\s*)?\()", "O"),
    (r"(?<=[0-9.])\{(\\(?:overline|bar|dot)\s*\{[0-9]+\})\}", r"\1"),
    (r"^_([^_]+)_(?=\s|$)", r"\1"),
    (
        r"^(?:「(.*)」|『(.*)』|《(.*)》|〈(.*)〉|【(.*)】|〖(.*)〗)$",
        lambda match: next(group for group in match.groups() if group is not None),
    ),
)
_BRACKETS = {
    "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")",
}  # fmt: skip


def strip_markup(text: str) -> str:
    """The text without markup that frames or decorates it."""
    if "&" in text:
        text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
    return apply_rules(_REWRITES, text).strip()
