"""Compares by relative precision numbers that math-verify rounds; loaded in the worker process."""

from __future__ import annotations

import ast
import re
import sys
from typing import Any

# Six decimal places show less than two digits of numbers below this, which are equal up to this relative precision.
LARGEST_TINY = 1e-4
RELATIVE_PRECISION = 1e-6
DIGITS = 30


def is_arithmetic(answer: str) -> bool:
    """Whether the whole answer is one arithmetic expression, such as 2**10."""
    if not re.fullmatch(r"[0-9 .+\-*/^()]+", answer):
        return False
    try:
        ast.parse(answer.replace("^", "**"), mode="eval")
    except (SyntaxError, MemoryError, RecursionError):
        return False
    return True


def approximates(decimal: str, numbers: list[Any]) -> bool:
    """Whether a decimal agrees in all its digits, and to a relative precision, with a number that is not a decimal."""
    match = re.fullmatch(r"-?[0-9]+\.([0-9]+)(?:\\times ?10\^\{(-?[0-9]{1,3})\})?", decimal)
    number: Any = numbers[0] if numbers else None
    if match is None or getattr(number, "is_number", False) is not True or getattr(number, "is_Float", True):
        return False
    import sympy

    exponent = int(match[2] or 0)
    value, written = number.evalf(DIGITS), sympy.Rational(decimal.split("\\")[0]) * sympy.Integer(10) ** exponent
    if not value.is_real or not value.is_finite:
        return False
    last_place = sympy.Integer(10) ** (exponent - len(match[1]))
    return bool(abs(value - written) <= min(last_place, RELATIVE_PRECISION * abs(value)))


def tell_apart_tiny_numbers() -> None:
    """Makes math-verify compare numbers that it would round to zero by relative precision."""
    import sympy

    grader: Any = sys.modules.get("math_verify.grader")
    if grader is None:
        return
    rounded = grader.sympy_numeric_eq

    def is_other(one: Any, other: Any) -> bool:
        sizes = []
        for number in (one, other):
            symbols = sorted(number.free_symbols, key=str)
            # Any numbers would do: multiples of a variable that differ at one value differ.
            value = number.subs({symbol: sympy.Rational(7 + 2 * i, 5) for i, symbol in enumerate(symbols)})
            value = value.evalf(DIGITS)
            if not value.is_number or not value.is_finite:
                return False
            sizes.append(value)
        apart, largest = abs(sizes[0] - sizes[1]), max(abs(sizes[0]), abs(sizes[1]))
        # A number whose digits cancel has no digit that is certain.
        sure = all(size == 0 or getattr(size, "_prec", DIGITS) > 1 for size in sizes)
        return bool(sure and largest < LARGEST_TINY and apart > RELATIVE_PRECISION * largest)

    def equal(one: Any, other: Any, *precision: int) -> bool:
        if not rounded(one, other, *precision):
            return False
        try:
            return not is_other(one, other)
        except (AttributeError, TypeError, ValueError, ArithmeticError):
            return True

    grader.sympy_numeric_eq = equal
