"""Drops words that announce an answer or call it approximate."""

from __future__ import annotations

import re

_NOUN = (
    r"(?:answers?|ans|results?|solutions?|values?|roots?|options?|choices?|conclusion|"
    r"total(?: (?:cost|amount|number))?|sum|area|volume|perimeter|probability|remainder|distance|speed)"
)
_QUALITY = r"(?:final|correct|right|exact|numerical|required|desired|overall|only|best|possible|simplified) "
_ANNOUNCEMENT = re.compile(
    r"(?:(?:so|thus|hence|therefore|and|finally),? ?)?"
    rf"(?:(?:(?:the|my|our|your) )?(?:{_QUALITY})*{_NOUN}(?: to (?:the|this) (?:problem|question))?"
    r" ?(?::|=| (?:is|are|equals|will be|would be)(?![a-z])) ?(?::|=)? ?"
    r"|(?:i |we )?(?:choose|pick|select) (?:option |choice )?(?=\(?[A-J](?![A-Za-z]))"
    r"|it(?: is| equals|'s) |(?:the )?final answer (?=[-+0-9\\(]))"
    r"(?:(?:approximately|about|roughly|simply|therefore|option|choice) )?"
    r"(?=[^\s.,;:])",
    re.IGNORECASE,
)
# Chinese, Japanese and Korean; European languages need a colon or a verb.
_FOREIGN = re.compile(
    r"(?:故|所以|因此|综上,?)?(?:最终|正确|最后)?(?:的)?(?:答案|結果|结果|答え|正解|정답|답|答|解)"
    r"(?:选项|選項)?\s?(?:为|為|是|は|은|는|应为|:)\s?:?\s?(?:选项|選項|选|選)?\s?(?=\S)"
    r"|(?:故|应|應|所以)?(?:选项|選項|选择|選擇|选|選)\s?:?\s?(?=[(\[【]?[A-J](?![A-Za-z]))"
    r"|(?:die |das |la |le |o |a |el |il )?(?:(?:r[ée]ponse|respuesta|resposta|risposta|resultado|r[ée]sultat)"
    r"(?: finale?| correct[ae])?|(?:endg[üu]ltige )?antwort|ergebnis|l[öo]sung|"
    r"ответ|результат|odpowied[źz]|cevap|đáp án|उत्तर|الجواب|الإجابة)"
    r"\s?(?::| est(?![a-z])| es(?![a-z])| é| è| ist(?![a-z])| lautet(?![a-z]))\s?:?\s?(?=\S)",
    re.IGNORECASE,
)
_ABOUT = re.compile(
    r"(?:(?:so|therefore|thus|hence|exactly|only|just|a total of),? ?)?"
    r"(?:(?:about|approximately|approx\.?|roughly|around|nearly|circa|ca\.|ungefähr|etwa|environ|aproximadamente|"
    r"примерно|приблизительно|около|大约|大約|约为|約為|约等于|约|約) ?)?"
    r"(?=[-+0-9.]|\\(?:frac|sqrt|pi))",
    re.IGNORECASE,
)


def drop_phrase(text: str) -> str:
    """The answer without words that announce it; a text of such words alone is unchanged."""
    for pattern in (_ANNOUNCEMENT, _FOREIGN, _ABOUT):
        if match := pattern.match(text):
            text = text[match.end() :]
    return text
