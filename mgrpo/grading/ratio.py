"""Quotients of polynomials in one symbol, and their real zeros, to 120 digits."""

from __future__ import annotations

import itertools
from typing import Any

import mpmath

MAX_DEGREE = 8

# 120 digits, and no value above 10^100: after cancellation 20 decimals are still correct.
M: Any = mpmath.MPContext()
M.dps = 120
SMALLEST = M.mpf(10) ** -15  # a smaller divisor is taken for an inexact zero
_ROOTS: Any = mpmath.MPContext()
_ROOTS.dps = 40


class UnknownError(Exception):
    """A value that is not computed."""


class TooLargeError(UnknownError):
    """A value that may be computed with more digits."""


class Ratio:
    """A quotient of two polynomials in one symbol; coefficients start with the lowest degree."""

    def __init__(self, top: list[Any], bottom: list[Any]):
        if max(len(top), len(bottom)) > MAX_DEGREE + 1:
            raise UnknownError
        if not all(isinstance(c, M.mpf) and abs(c) < M.mpf(10) ** 30 for c in top + bottom):
            raise UnknownError
        self.top, self.bottom = top, bottom

    def number(self) -> Any:
        """The value of a constant quotient."""
        if abs(self.bottom[0]) < SMALLEST:
            raise UnknownError
        return self.top[0] / self.bottom[0]

    def __add__(self, other: Any) -> Ratio:
        other = as_ratio(other)
        if other.bottom == self.bottom:
            return Ratio(_sum(self.top, other.top), self.bottom)
        return Ratio(
            _sum(_product(self.top, other.bottom), _product(other.top, self.bottom)),
            _product(self.bottom, other.bottom),
        )

    def __mul__(self, other: Any) -> Ratio:
        other = as_ratio(other)
        return Ratio(_product(self.top, other.top), _product(self.bottom, other.bottom))

    def __rtruediv__(self, other: Any) -> Ratio:
        if not trim(self.top):
            raise UnknownError
        return as_ratio(other) * Ratio(self.bottom, self.top)

    __radd__, __rmul__ = __add__, __mul__

    def at(self, x: Any) -> tuple[Any, Any]:
        """Values of the two polynomials at a point."""
        return M.polyval(self.top[::-1], x), M.polyval(self.bottom[::-1], x)

    def roots(self) -> list[Any]:
        """The zeros, real ones first, without those of the denominator."""
        zeros = []
        for x in find_roots(self.top):
            below = abs(self.at(x)[1])
            if M.mpf(10) ** -15 < below < M.mpf(10) ** -6:
                raise UnknownError
            if below > M.mpf(10) ** -6:
                zeros.append(x)
        return zeros


def as_ratio(value: Any) -> Ratio:
    """A number or quotient as a quotient."""
    return value if isinstance(value, Ratio) else Ratio([value], [M.mpf(1)])


def _sum(one: list[Any], other: list[Any]) -> list[Any]:
    """Coefficients of the sum."""
    return [a + b for a, b in itertools.zip_longest(one, other, fillvalue=M.mpf(0))]


def _product(one: list[Any], other: list[Any]) -> list[Any]:
    """Coefficients of the product."""
    result = [M.mpf(0)] * (len(one) + len(other) - 1)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            result[i + j] += a * b
    return result


def trim(coefficients: list[Any]) -> list[Any]:
    """The coefficients without leading ones that are zero up to rounding; empty for the zero polynomial."""
    sizes = [abs(c) for c in coefficients]
    if any(M.mpf(10) ** -60 < size < M.mpf(10) ** -20 for size in sizes):
        raise UnknownError
    last = max((i for i, size in enumerate(sizes) if size > M.mpf(10) ** -30), default=-1)
    return coefficients[: last + 1]


def find_roots(coefficients: list[Any]) -> list[Any]:
    """The zeros of a polynomial, real ones first; none for the zero polynomial, as in `sympy.solve`."""
    coefficients = trim(coefficients)
    if len(coefficients) < 2:
        return []
    if len(coefficients) == 2:
        return [-coefficients[0] / coefficients[1]]
    if len(coefficients) == 3:
        c, b, a = coefficients
        middle, square = -b / (2 * a), b * b - 4 * a * c
        if abs(square) < SMALLEST * (b * b + abs(a * c)):
            return [middle]
        half = M.sqrt(square) / (2 * a)
        return sorted([middle - half, middle + half]) if square > 0 else [middle - half, middle + half]
    try:
        found = _ROOTS.polyroots([_ROOTS.mpf(c) for c in coefficients[::-1]], maxsteps=100, extraprec=60)
    except (_ROOTS.NoConvergence, ZeroDivisionError) as error:
        raise UnknownError from error
    real, others = [], []
    for x in found:
        off = abs(x.imag) / (1 + abs(x.real))
        if 1e-8 < off < 1e-4:  # too close to tell whether it is real
            raise UnknownError
        if off <= 1e-8:
            real.append(M.mpf(x.real))
        else:
            others.append(M.mpc(x))
    return sorted(real) + others


def real_only(roots: list[Any]) -> list[Any]:
    """The real roots."""
    return [x for x in roots if isinstance(x, M.mpf)]
