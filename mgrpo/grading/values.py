"""Exact values of numbers in answers, and their comparison."""

from __future__ import annotations

import ast
import functools
import math
import operator
import re
from dataclasses import dataclass
from fractions import Fraction

# Larger numbers are left to math-verify.
MAX_FACTORIAL = 1000
MAX_EXPONENT = 5000
MAX_BITS = 1 << 16
# A decimal is equal to a number that it agrees with to this precision and in all its digits ...
RELATIVE_PRECISION = Fraction(1, 10**6)
# ... or, as in math-verify, rounded to six places, unless so few digits are left that other numbers round alike.
ROUNDED_PLACES = 6
LEAST_ROUNDED = Fraction(1, 10**4)

_PLAIN = re.compile(
    r"(-?)([0-9]+)(?:\.([0-9]+))?"
    r"(?:(?:\\times|\\cdot|\*) ?10(?:\^\{(-?[0-9]+)\}|\*\*\(?(-?[0-9]+)\)?)|[eE]([+-]?[0-9]+))?"
)
_MIXED = re.compile(r"(?<![0-9.}])([0-9]+)\\frac\{([0-9]+)\}\{([0-9]+)\}")
_FRACTION = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}")
_BINOMIAL = re.compile(r"\\[dt]?binom\{([^{}]*)\}\{([^{}]*)\}")
_POWER = re.compile(r"\^(?:\{([^{}]*)\}|([0-9]))")
_FACTORIAL = re.compile(r"(?<![0-9.)])([0-9]+)!(?!!)")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@dataclass(frozen=True, kw_only=True)
class Value:
    """A rational number and its notation."""

    exact: Fraction
    plain: bool  # a decimal or integer, possibly times a power of ten
    last_place: Fraction | None  # of a plain number with a decimal point
    inexact: bool  # has a decimal point somewhere


@functools.lru_cache(maxsize=16384)
def read_value(form: str) -> Value | None:
    """The exact value of a canonical form that is rational arithmetic of bounded size, else None."""
    if match := _PLAIN.fullmatch(form):
        digits, decimals = match[2], match[3] or ""
        exponent = int(next(filter(None, match.groups()[3:]), 0))
        if abs(exponent) > MAX_EXPONENT:
            return None
        last_place = Fraction(10) ** (exponent - len(decimals))
        value = int(digits + decimals) * last_place
        value = -value if match[1] else value
        return Value(exact=value, plain=True, last_place=last_place if decimals else None, inexact=bool(decimals))
    if not re.fullmatch(r"[0-9.+\-*/^!(){} ]*(?:\\(?:frac|times|cdot|[dt]?binom)[0-9.+\-*/^!(){} ]*)*", form):
        return None
    if not re.search(r"[0-9]", form):
        return None
    try:
        exact = _evaluate(ast.parse(_spell_python(form), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None
    return Value(exact=exact, plain=False, last_place=None, inexact="." in form)


def _spell_python(form: str) -> str:
    """The form as a Python expression of integers; ValueError where LaTeX is left over."""
    text = _MIXED.sub(r"(\1+\\frac{\2}{\3})", form)
    text = _FACTORIAL.sub(r"factorial(\1)", text)
    before = None
    while text != before:
        before = text
        text = _FRACTION.sub(r"((\1)/(\2))", text)
        text = _BINOMIAL.sub(r"binomial(\1,\2)", text)
        text = _POWER.sub(lambda match: f"**({match[1] or match[2]})", text)
    text = re.sub(r"\\(?:times|cdot) ?", "*", text)
    if re.search(r"[\\^!{}]|//", text):
        raise ValueError("not arithmetic")
    return _NUMBER.sub(_spell_number, text)


def _spell_number(match: re.Match[str]) -> str:
    """A decimal as a quotient of integers."""
    whole, point, decimals = match[0].partition(".")
    digits = (whole + decimals).lstrip("0") or "0"
    return f"({digits}/{10 ** len(decimals)})" if point else digits


def _evaluate(node: ast.expr) -> Fraction:
    """The value of an expression; ValueError where it is too large or not arithmetic."""
    match node:
        case ast.Constant(value=int(number)):
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _evaluate(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _raise(_evaluate(left), _evaluate(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _bounded(_OPERATORS[type(op)](_evaluate(left), _evaluate(right)))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            values = [_evaluate(argument) for argument in arguments]
            if all(value.denominator == 1 and 0 <= value <= MAX_FACTORIAL for value in values):
                return Fraction({"factorial": math.factorial, "binomial": math.comb}[name](*map(int, values)))
    raise ValueError("not arithmetic")


def _raise(base: Fraction, exponent: Fraction) -> Fraction:
    """A power with an integer exponent, of bounded size."""
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT or size * abs(exponent) > MAX_BITS:
        raise ValueError("too large")
    return base ** int(exponent)


def _bounded(value: Fraction) -> Fraction:
    """The value; ValueError where it is too large."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError("too large")
    return value


def same_values(one: Value, other: Value) -> bool | None:
    """Whether two numbers are the same, None where math-verify has to round them.

    Two plain numbers are the same where they are equal; a decimal is also the same as a number that it approximates.
    """
    if one.exact == other.exact:
        return True
    if one.inexact and other.inexact and not (one.plain and other.plain):
        return None
    if one.inexact == other.inexact or (one.plain and other.plain):
        return False
    decimal, number = (one, other) if one.inexact else (other, one)
    apart, size = abs(decimal.exact - number.exact), abs(number.exact)
    if apart <= RELATIVE_PRECISION * size and (decimal.last_place is None or apart <= decimal.last_place):
        return True
    return size >= LEAST_ROUNDED and round(decimal.exact, ROUNDED_PLACES) == round(number.exact, ROUNDED_PLACES)
