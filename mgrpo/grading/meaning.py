"""What a canonical form stands for, alone and beside another: choices, number bases, assignments, units, words."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

from mgrpo.grading.canonical import normalize_number
from mgrpo.grading.units import drop_unit
from mgrpo.grading.values import Value, read_value, same_values

MAX_MATH_CHARS = 300

# (B), (B)12, B.12, B:12 and B)12, but not sums, products and names such as (A)+1, (A)(B) and J.K.Rowling.
_CHOICE = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer):? ?)?(?:\(([A-J])\)|([A-J])[.:)])"
    r"(?![A-Z]$|[A-Z]\.|[=^_*+<>'/|&,;!]|\\(?:cdot|times|cap|cup|setminus|to|le|ge|Right|in)(?![a-z])|(?:and|or)(?![a-z]))"
    r"(?!.*\([A-J]\)).*|(?:[Oo]ption|[Cc]hoice):? ?([A-J])",
    re.DOTALL,
)
_LETTER = re.compile(r"[A-J]")
_DIGIT_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASED = re.compile(
    r"(-?)\(?([0-9][0-9A-Fa-f]*(?:\.[0-9A-Fa-f]+)?|[A-F][0-9A-F]*(?=\)?_\{?1[1-6]))\)?_"
    rf"(?:\{{\(?([0-9]+|{'|'.join(_DIGIT_WORDS)})\)?\}}|([0-9]))"
)
_GREEK = "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega"
_VARIABLE = rf"(?:[A-Za-z]|\\(?:var)?(?:{_GREEK}) ?)(?:_(?:\{{[0-9A-Za-z]+\}}|[0-9A-Za-z]))?"
_ASSIGNMENT = re.compile(rf"({_VARIABLE})=([^=<>]+)")
_NAMED_TUPLE = re.compile(rf"\(({_VARIABLE}(?:,{_VARIABLE})+)\)=(\(.*\))", re.DOTALL)
_EXPONENT = re.compile(r"(-?[0-9]+)e([+-][0-9]+)")
_MERIDIEM = re.compile(r"[0-9] ([ap])m")
_NOT_A_LIST = re.compile(r"\\(?:begin|end|in|cup|cap|le|ge|text|mid|quad|text)(?![a-z])|[|]")


@functools.lru_cache(maxsize=16384)
def reduce_form(form: str) -> str:
    """What forms are compared by: a choice without its text, a value without its unit, assignments in order."""
    if len(form) > MAX_MATH_CHARS:
        return form
    if match := _CHOICE.fullmatch(form):
        return match[1] or match[2] or match[3]
    bare = drop_unit(form)
    form = normalize_number(bare) or bare
    if match := _NAMED_TUPLE.fullmatch(form):
        names, values = match[1].split(","), _split_tuple(match[2])
        if values and len(values) == len(set(names)) == len(names):
            form = ",".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    if assignments := _read_assignments(form):
        return ",".join(f"{name}={value}" for name, value in sorted(assignments.items(), key=_variable_order))
    return form


def align(first: str, second: str) -> tuple[str, str] | None:
    """Two reduced forms as they can be compared; None where they differ by a base, a variable or half of the day."""
    one, other = _BASED.fullmatch(first), _BASED.fullmatch(second)
    if one and other:
        return None if _base(one) != _base(other) else (_digits(one), _digits(other))
    if one and _is_number(second):
        return _digits(one), second
    if other and _is_number(first):
        return first, _digits(other)
    first, second = _spell_exponent(first, second), _spell_exponent(second, first)
    first_half, second_half = _MERIDIEM.search(first), _MERIDIEM.search(second)
    if first_half and second_half and first_half[1] != second_half[1]:
        return None
    assigned, assigned_too = _read_assignments(first), _read_assignments(second)
    if assigned and assigned_too:
        if list(assigned) != list(assigned_too):
            return None
        return _join(assigned), _join(assigned_too)
    if assigned and _split_tuple(second):
        return _join(assigned), second
    if assigned_too and _split_tuple(first):
        return first, _join(assigned_too)
    return first, second


def compare_cheaply(first: str, second: str) -> bool | None:
    """The verdict on two different reduced forms where it needs no algebra, else None."""
    if max(len(first), len(second)) > MAX_MATH_CHARS:
        return False
    # Most answers are plain numbers, and nearly all pairs of a group that come here are different ones.
    one, other = read_value(first), read_value(second)
    if one is not None and other is not None:
        return same_values(one, other)
    pair = align(first, second)
    if pair is None:
        return False
    first, second = pair
    if first == second:
        return True
    if _LETTER.fullmatch(first) and _LETTER.fullmatch(second):
        return False
    words, words_too = _are_words(first), _are_words(second)
    if words and words_too:
        # To an algebra system words are products of letters, and anagrams equal.
        return first.casefold() == second.casefold()
    if (words or words_too) and _letters(first) != _letters(second):
        return False
    return _compare_numbers(first, second)


def _compare_numbers(first: str, second: str) -> bool | None:
    """The verdict on two numbers, None where one is none; 50% is 50, for the sign is left off, and 1/2."""
    is_percentage, is_percentage_too = first.endswith("%"), second.endswith("%")
    first, second = first.removesuffix("%"), second.removesuffix("%")
    if first == second:
        return True
    one, other = read_value(first), read_value(second)
    if one is None or other is None:
        return None
    verdict = same_values(one, other)
    if is_percentage and not is_percentage_too:
        verdict = verdict or same_values(_hundredth(one), other)
    elif is_percentage_too and not is_percentage:
        verdict = verdict or same_values(one, _hundredth(other))
    return verdict


def _hundredth(value: Value) -> Value:
    """A percentage as the number that it is."""
    return replace(value, exact=value.exact / 100, last_place=value.last_place and value.last_place / 100)


def _spell_exponent(form: str, other: str) -> str:
    """2e-3 as a number, but for a form beside it that has Euler's number too."""
    match = _EXPONENT.fullmatch(form)
    if match is None or re.search(r"(?<![A-Za-z\\])e(?![A-Za-z0-9])", other):
        return form
    return rf"{match[1]}\times 10^{{{int(match[2])}}}"


def _are_words(form: str) -> bool:
    """Whether a form is letters only, two or more of which stand together, and no list of variables."""
    parts = re.split(r"[ '\-’]+", form)  # noqa: RUF001
    if not all(part.isalpha() or not part for part in parts):
        return False
    return any(len(part) > 1 and part not in ("and", "or") for part in parts)


def _letters(form: str) -> set[str]:
    """The letters of a form that are no LaTeX command, in lower case."""
    return set(re.sub(r"\\[A-Za-z]+|[^\w]|[\d_]", "", form).casefold())


def _is_number(form: str) -> bool:
    """Whether a form may be a number whose base was left off."""
    return re.fullmatch(r"-?(?:[0-9][0-9A-Fa-f]*(?:\.[0-9A-Fa-f]+)?|[A-F][0-9A-F]*)", form) is not None


def _base(match: re.Match[str]) -> int:
    """The base of a number that is written with it."""
    name = match[3] or match[4]
    return _DIGIT_WORDS.get(name) or int(name)


def _digits(match: re.Match[str]) -> str:
    """The sign and digits of a number that is written with its base."""
    return match[1] + (match[2].upper().lstrip("0") or "0")


def _join(assigned: dict[str, str]) -> str:
    """The values alone, as a tuple where there are several."""
    values = ",".join(assigned.values())
    return f"({values})" if len(assigned) > 1 else values


def _variable_order(item: tuple[str, str]) -> tuple[bool, str]:
    """Latin letters come before Greek ones, as in (r, theta)."""
    return item[0].startswith("\\"), item[0]


@functools.lru_cache(maxsize=16384)
def _read_assignments(form: str) -> dict[str, str] | None:
    """The values of different variables, such as those of x=1,y=2; None for any other form."""
    if "=" not in form or _NOT_A_LIST.search(form):
        return None
    found: dict[str, str] = {}
    for part in _split(re.sub(r",? (?:and|or) |;|\\\\", ",", form)):
        match = _ASSIGNMENT.fullmatch(part.strip())
        if match is None or match[1].strip() in found:
            return None
        found[match[1].strip()] = match[2]
    return found


def _split_tuple(form: str) -> list[str] | None:
    """The two or more parts of a tuple in round parentheses, None for any other form."""
    if not (form.startswith("(") and form.endswith(")")):
        return None
    parts = _split(form[1:-1])
    return parts if parts and len(parts) > 1 and all(parts) else None


def _split(text: str) -> list[str]:
    """The parts between the commas that are in no bracket; nothing where brackets do not match."""
    parts, depth, start = [], 0, 0
    for place, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return []
        if char == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]] if depth == 0 else []
