"""Reduces and compares canonical forms by meaning: choices, number bases, assignments, units and words."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

from mgrpo.grading.bases import align_bases, has_base
from mgrpo.grading.canonical import canonicalize
from mgrpo.grading.choices import read_choice
from mgrpo.grading.units import drop_unit, split_sense
from mgrpo.grading.values import Value, read_value, same_values

MAX_MATH_CHARS = 300

_LETTER = re.compile(r"[A-J]")
_GREEK = "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega"
_VARIABLE = rf"(?:[A-Za-z]|\\(?:var)?(?:{_GREEK}) ?)(?:_(?:\{{[0-9A-Za-z]+\}}|[0-9A-Za-z]))?'*(?:\([A-Za-z0-9]+\))?"
_ASSIGNMENT = re.compile(rf"({_VARIABLE})=([^=<>]+)")
_NAMED_TUPLE = re.compile(rf"\(({_VARIABLE}(?:,{_VARIABLE})+)\)=(\(.*\))", re.DOTALL)
_SYSTEM = re.compile(
    r"\\\{((?:(?!\\begin).)*?)(?:\\\})?|(?:\\\{)?\\begin\{(?:cases|array|aligned)\}(?:\{[lcr]*\})?(.*)\\end\{(?:cases|array|aligned)\}",
    re.DOTALL,
)
_EMPTY = re.compile(r"(?:the |an )?(?:empty|null) set|[Nn]ull set", re.IGNORECASE)
_EXPONENT = re.compile(r"(?<![^,(\[{=])(-?[0-9]+)e([+-][0-9]+)(?![^,)\]}\\])")
_MERIDIEM = re.compile(r"[0-9] ([ap])m")
# Marks that math-verify drops.
_OPEN_LIST, _PRIME = re.compile(r"\\ldots"), re.compile(r"[A-Za-z]'")
_RELATION = re.compile(r"(.*(?:<|>|\\(?:le|ge|leq|geq|lt|gt|ne) ?))(.+)")
# 5x-7y+4=0, which math-verify reads as an assignment of 0; a+b=0 may be one.
_EQUATION = re.compile(r"(?=.*[0-9].*=)(?=.*[A-Za-z])[^=<>]+[+-][^=<>]+=0")
_ANGLE = re.compile(r"\\(?:measured)?angle ?\{?([A-Z])([A-Z])([A-Z])\}?")
_AND = re.compile(r",? (?:and|or) ")
_NOT_A_LIST = re.compile(r"\\(?:begin|end|in|cup|cap|le|ge|text|mid|quad|text)(?![a-z])|[|]")


@functools.lru_cache(maxsize=16384)
def reduce_form(form: str) -> str:
    """The form for comparison: a choice without its text, a value without its unit, assignments in order."""
    if len(form) > MAX_MATH_CHARS:
        return form
    if letter := read_choice(form):
        return letter
    bare = drop_unit(form)
    form = _spell_tuple(bare if bare == form or "\\text" in bare else canonicalize(bare))
    if match := _NAMED_TUPLE.fullmatch(form):
        names, values = match[1].split(","), _split_tuple(match[2])
        if values and len(values) == len(set(names)) == len(names):
            form = ",".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    if assignments := _read_assignments(form):
        return _write(assignments)
    return _read_points(form) or _EMPTY.sub(r"\\emptyset ", form).strip()


def rank(form: str) -> int:
    """The rank of a form in its group, lowest first, so that no form joins two that differ.

    Forms that say more come first: 234 may be 234_5 or 234_7, and 5 may be 5 east or 5 west. A percentage, which may be
    35 or 0.35, comes last.
    """
    if form.endswith("%"):
        return 2
    return 0 if has_base(form) or _MERIDIEM.search(form) or split_sense(form)[1] else 1


def _spell_tuple(form: str) -> str:
    """A tuple with commas in place of semicolons."""
    return form.replace(";", ",") if "," not in form and re.fullmatch(r".*\([^()]*;[^()]*\)", form) else form


def _write(assignments: dict[str, str]) -> str:
    """Assignments in alphabetical order."""
    return ",".join(f"{name}={value}" for name, value in sorted(assignments.items(), key=_variable_order))


def _read_points(form: str) -> str | None:
    """Solutions in several variables, such as x=1,y=2 or x=3,y=4, as points; None for any other form."""
    points = [_read_assignments(part) for part in re.split(r",? or |;", form)]
    if len(points) < 2 or not all(points):
        return None
    sorted_points = [dict(sorted(point.items(), key=_variable_order)) for point in points if point]
    if len(sorted_points[0]) < 2 or any(list(point) != list(sorted_points[0]) for point in sorted_points):
        return None
    return ",".join(map(_join, sorted_points))


def align(first: str, second: str) -> tuple[str, str] | None:
    """Two reduced forms, ready to compare; None where they differ by a base, a variable or half of the day."""
    if (pair := align_bases(first, second)) is None:
        return None
    first, second = pair
    (first, sense), (second, other_sense) = split_sense(first), split_sense(second)
    if sense and other_sense and sense != other_sense:
        return None
    first, second = _spell_exponent(first, second), _spell_exponent(second, first)
    first_half, second_half = _MERIDIEM.search(first), _MERIDIEM.search(second)
    if first_half and second_half and first_half[1] != second_half[1]:
        return None
    if bool(first_half) != bool(second_half):
        first, second = (re.sub(r"(?<=[0-9]) [ap]m", "", form) for form in (first, second))
    assigned, assigned_too = _read_assignments(first), _read_assignments(second)
    if assigned and assigned_too:
        if list(assigned) != list(assigned_too):
            return None
        return _join(assigned), _join(assigned_too)
    return _like(second, first, assigned), _like(first, second, assigned_too)


def _like(other: str, form: str, assigned: dict[str, str] | None) -> str:
    """A form with assigned values, or a list without brackets, as a tuple where the other form is one."""
    if not _split_tuple(other):
        return form
    return _join(assigned) if assigned else f"({_AND.sub(',', form)})" if _is_list(form) else form


def compare_cheaply(first: str, second: str) -> bool | None:
    """Whether two different reduced forms are equal, None where only algebra can tell."""
    if max(len(first), len(second)) > MAX_MATH_CHARS:
        return False
    # Most answers are plain numbers, and nearly all pairs of a group that get here differ.
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
    one, other = _ANGLE.fullmatch(first), _ANGLE.fullmatch(second)
    if one and other:
        return one[2] == other[2] and {one[1], one[3]} == {other[1], other[3]}
    words, words_too = _are_words(first), _are_words(second)
    if words and words_too:
        # An algebra system reads words as products of letters, so that anagrams are equal.
        return _spell_words(first) == _spell_words(second)
    if (words or words_too) and _letters(first) != _letters(second):
        return False
    if any(bool(mark.search(first)) != bool(mark.search(second)) for mark in (_OPEN_LIST, _PRIME)):
        return False
    if (first == "0" or second == "0") and (_EQUATION.fullmatch(first) or _EQUATION.fullmatch(second)):
        return False
    one, other = _RELATION.fullmatch(first), _RELATION.fullmatch(second)
    if one and other and one[1] == other[1] and read_value(one[2]) and read_value(other[2]):
        first, second = one[2], other[2]
    return _compare_numbers(first, second)


def _compare_numbers(first: str, second: str) -> bool | None:
    """Whether two numbers are equal, None where one is no number; 50% equals 50, without its sign, and 1/2."""
    is_percentage, is_percentage_too = first.endswith("%"), second.endswith("%")
    first, second = first.removesuffix("%"), second.removesuffix("%")
    if first == second:
        return True
    one, other = read_value(first), read_value(second)
    if one is None or other is None:
        return None
    equal = same_values(one, other)
    if is_percentage == is_percentage_too:
        return equal
    return equal or same_values(
        _hundredth(one) if is_percentage else one, _hundredth(other) if is_percentage_too else other
    )


def _hundredth(value: Value) -> Value:
    """The number that a percentage stands for."""
    return replace(value, exact=value.exact / 100, last_place=value.last_place and value.last_place / 100)


def _spell_exponent(form: str, other: str) -> str:
    """Reads 2e-3 as a number, alone or in a list, unless the other form has Euler's number too."""
    if not _EXPONENT.search(form) or re.search(r"(?<![A-Za-z\\])e(?![A-Za-z0-9])", other):
        return form
    return _EXPONENT.sub(lambda match: rf"{match[1]}\times 10^{{{int(match[2])}}}", form)


def _are_words(form: str) -> bool:
    """Whether a form consists of words: letters only, and no list of variables."""
    parts = re.split(r"[ ,.:;!?'()/\-’]+", form)  # noqa: RUF001
    if not all(part.isalpha() or not part for part in parts):
        return False
    return any(len(part) > 1 and part not in ("and", "or") for part in parts)


def _spell_words(form: str) -> list[str]:
    """Words in lower case without a plural s; lists in alphabetical order."""
    parts = re.split(r",? (?:and|or) |[,;]", form.casefold())
    words = [re.sub(r"(?<=[^\W\d_]{3})s(?!\w)|[ .:!?()]", "", part) for part in parts]
    return words if form.startswith("(") else sorted(words)


def _is_list(form: str) -> bool:
    """Whether a form is several values between commas, without brackets."""
    return not form.startswith(("(", "[", "\\")) and len(_split(_AND.sub(",", form))) > 1


def _letters(form: str) -> set[str]:
    """The letters of a form outside LaTeX commands, in lower case."""
    return set(re.sub(r"\\[A-Za-z]+|[^\w]|[\d_]", "", form).casefold())


def _join(assigned: dict[str, str]) -> str:
    """The assigned values, as a tuple where there are several."""
    values = ",".join(assigned.values())
    return f"({values})" if len(assigned) > 1 else values


def _variable_order(item: tuple[str, str]) -> tuple[bool, str]:
    """The sort key of a variable: Latin letters before Greek ones, as in (r, theta)."""
    return item[0].startswith("\\"), item[0]


@functools.lru_cache(maxsize=16384)
def _read_assignments(form: str) -> dict[str, str] | None:
    """The values of different variables, such as those of x=1,y=2; None for any other form."""
    if "=" not in form:
        return None
    found: dict[str, str] = {}
    if match := _SYSTEM.fullmatch(form):
        form = next(filter(None, match.groups())).replace("&", "").removesuffix(r"\\").strip(" .,;")
    for part in _split(
        re.sub(
            r"(?:,? (?:and|or) |,? ?\\(?:land|wedge) ?|;|&|(?<=[0-9})]) (?=[A-Za-z]=)|,?\\\\)(?:\[[^\[\]]*\])?",
            ",",
            form,
        )
    ):
        match = _ASSIGNMENT.fullmatch(part.strip())
        if match is None or _NOT_A_LIST.search(part) or match[1].strip() in found:
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
    """The parts between commas outside brackets; empty where brackets do not match."""
    parts, depth, start = [], 0, 0
    for place, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return []
        if char == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]] if depth == 0 else []
