"""The value of an expression at fixed points of its symbols."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from mgrpo.grading.ratio import MAX_DEGREE, SMALLEST, M, Ratio, TooLargeError, UnknownError

NUM_POINTS = 4
MAX_TERMS = 200
MAX_FACTORIAL = 1000
LARGE_DIGITS = 2600


def _place(name: str, k: int) -> Any:
    """The coordinate of a symbol at point k: below 1, above 1 or far above 1, because high powers hide the other terms.

    At the last point symbols are even integers, so that powers of -1, sums and large roots have values.
    """
    digest = hashlib.blake2b(f"{name.lower()} {k}".encode(), digest_size=4).digest()
    share = M.mpf(int.from_bytes(digest, "big")) / 2**32
    whole = 2 * (5 + M.floor(30 * share))
    return (M.mpf("0.35") + share / 2, M.mpf("1.2") + 4 * share / 5, M.mpf("5.3") + 3 * share, whole)[k]


def value_at(item: Any, k: int) -> Any:
    """The value at point k for JSON: a number, a pair of real and imaginary part, or None where it is unknown.

    A number may have thousands of digits; beyond 10^300 it is given on a logarithmic scale.
    """
    for digits in (M.dps, LARGE_DIGITS):
        try:
            with M.workdps(digits):
                return spell(evaluate(item, k, {}))
        except TooLargeError:
            continue
        except UnknownError:
            break
    return None


def spell(value: Any) -> Any:
    """A real value as a float, a complex one as two."""
    if isinstance(value, M.mpc):
        return [spell(value.real), spell(value.imag)]
    large = M.mpf(10) ** 300
    if abs(value) < large:
        return float(value)
    return float(M.sign(value) * large * (M.log10(abs(value)) - 299))


def evaluate(item: Any, k: int, given: dict[str, Any]) -> Any:
    """The value of an expression at point k; `given` replaces the coordinates of symbols.

    Raises UnknownError for an unlisted function, and for a value that is too large or too near a pole or a jump.
    """

    def value(part: Any) -> Any:
        return _check(_apply(part))

    def _apply(part: Any) -> Any:
        if part.is_Symbol or isinstance(part, AppliedUndef):
            name = str(part).lower()
            if name in given:
                return given[name]
            # An undefined function is taken to be linear, so that equal arguments give equal values.
            return _place(str(part.func) if part.args else name, k) + sum(
                (value(argument) * _place(f"argument {i}", k) for i, argument in enumerate(part.args)), M.mpf(0)
            )
        if part.is_Rational:
            return M.mpf(part.p) / part.q
        if part.is_Float:
            return M.mpf(part._mpf_)
        if part is sympy.I:
            return M.mpc(0, 1)
        if part is sympy.pi or part is sympy.E:
            return +M.pi if part is sympy.pi else +M.e
        if part.is_Add:
            return sum((value(term) for term in part.args), M.mpf(0))
        if part.is_Mul:
            return math.prod((value(factor) for factor in part.args), start=M.mpf(1))
        if part.is_Pow:
            return _power(value(part.base), value(part.exp))
        if isinstance(part, sympy.UnevaluatedExpr):
            return value(part.args[0])
        if isinstance(part, (sympy.Sum, sympy.Product)):
            return _add_up(part, k, given, [value(end) for end in part.limits[0][1:]])
        function = _FUNCTIONS.get(type(part))
        if function is None:
            raise UnknownError
        arguments = [value(argument) for argument in part.args]
        if any(isinstance(argument, Ratio) for argument in arguments):
            raise UnknownError
        try:
            return function(*arguments)
        except (ArithmeticError, ValueError, TypeError) as error:
            raise UnknownError from error

    return value(item)


def _check(value: Any) -> Any:
    """The value if it is exact enough to compute with, without an imaginary part of exactly zero."""
    if isinstance(value, Ratio):
        return value.number() if len(value.top) == len(value.bottom) == 1 else value
    if isinstance(value, M.mpc):
        if value.imag == 0:
            value = value.real
        elif abs(value.imag) < SMALLEST * abs(value.real):  # the side of the branch cut is unknown
            raise UnknownError
    if not M.mag(value) <= _largest_bits():
        raise TooLargeError
    return value


def _largest_bits() -> float:
    """Bits of the largest value that leaves 20 correct decimals."""
    return 3.3 * (M.dps - 20)


def _add_up(item: Any, k: int, given: dict[str, Any], ends: list[Any]) -> Any:
    """The value of a sum or product over few integers."""
    if len(item.limits) != 1 or len(ends) != 2 or not all(isinstance(end, M.mpf) and M.isint(end) for end in ends):
        raise UnknownError
    low, high = map(int, ends)
    if not 0 <= high - low <= MAX_TERMS:
        raise UnknownError
    name = str(item.limits[0][0]).lower()
    terms = (evaluate(item.function, k, {**given, name: M.mpf(i)}) for i in range(low, high + 1))
    return sum(terms, M.mpf(0)) if isinstance(item, sympy.Sum) else math.prod(terms, start=M.mpf(1))


def _power(base: Any, exponent: Any) -> Any:
    """The principal value of a power."""
    if isinstance(exponent, Ratio):
        raise UnknownError
    whole = int(exponent) if isinstance(exponent, M.mpf) and exponent == int(exponent) else None
    if isinstance(base, Ratio):
        if whole is None or abs(whole) > MAX_DEGREE:
            raise UnknownError
        power = math.prod([base] * abs(whole), start=M.mpf(1))
        return M.mpf(1) / power if whole < 0 else power
    if abs(base) < SMALLEST:
        if base == 0 and whole is not None and whole > 0:
            return M.mpf(0)
        raise UnknownError
    bits = exponent * M.log(abs(base), 2)
    if abs(bits) > _largest_bits():
        raise TooLargeError if bits.real > 0 else UnknownError
    return base**whole if whole is not None else M.power(base, exponent)


def _away_from_zero(function: Callable[[Any], Any]) -> Callable[..., Any]:
    """A logarithm with an optional base, unknown where its argument or the logarithm of its base is near zero."""

    def safe(value: Any, base: Any = None) -> Any:
        below = M.mpf(1) if base is None else function(base)
        if min(abs(value), abs(below)) < SMALLEST:
            raise UnknownError
        return function(value) / below

    return safe


def _away_from_integers(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A rounding function, unknown for a number that is close to an integer without being one."""

    def safe(value: Any) -> Any:
        nearest = M.nint(value)
        if value != nearest and abs(value - nearest) < SMALLEST:
            raise UnknownError
        return function(value)

    return safe


def _factorial(value: Any) -> Any:
    """The factorial of a small integer."""
    if not 0 <= value <= MAX_FACTORIAL or not M.isint(value):
        raise UnknownError
    return M.mpf(math.factorial(int(value)))


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{getattr(sympy, name): getattr(M, name) for name in ("sin", "cos", "tan", "sec", "csc", "cot", "exp")},
    **{getattr(sympy, name): getattr(M, name) for name in ("sinh", "cosh", "tanh", "asin", "acos", "atan")},
    sympy.Abs: abs,
    sympy.log: _away_from_zero(M.log),
    sympy.floor: _away_from_integers(M.floor),
    sympy.ceiling: _away_from_integers(M.ceil),
    sympy.factorial: _factorial,
    sympy.binomial: M.binomial,
    sympy.Max: max,
    sympy.Min: min,
}


def difference(item: Any, name: str, k: int) -> Any:
    """Left minus right side, as a quotient of polynomials in the named symbol, at point k of the others."""
    given = {name: Ratio([M.mpf(0), M.mpf(1)], [M.mpf(1)])}
    return evaluate(item.lhs, k, given) + M.mpf(-1) * evaluate(item.rhs, k, given)
