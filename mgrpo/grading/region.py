"""Sets of real numbers, represented by their breakpoints."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from mgrpo.grading.evaluation import NUM_POINTS, difference, evaluate
from mgrpo.grading.ratio import M, Ratio, UnknownError, as_ratio, find_roots, real_only, trim


class Region:
    """A set of real numbers: breakpoints, and for each cell before, at, between and after them whether it is inside.

    Breakpoints that change nothing are left out, so that equal sets have equal breakpoints.
    """

    def __init__(self, breaks: list[Any], cells: list[bool]):
        kept = [i for i in range(len(breaks)) if not cells[2 * i] == cells[2 * i + 1] == cells[2 * i + 2]]
        self.breaks = [breaks[i] for i in kept]
        self.cells = [cells[0], *(cells[j] for i in kept for j in (2 * i + 1, 2 * i + 2))]
        if any(b - a < M.mpf(10) ** -4 * (1 + abs(a)) for a, b in itertools.pairwise(self.breaks)):
            raise UnknownError

    def holds(self, x: Any) -> bool:
        """Whether the region contains a number."""
        return self.cells[sum((b < x) + (b <= x) for b in self.breaks)]

    def describe(self) -> list[Any]:
        """The alternatives of a fingerprint: finitely many points are also a finite set."""
        if self.breaks and not any(self.cells[::2]):
            return [["set", [[["number", [float(b)] * NUM_POINTS]] for b in self.breaks]]]
        return [["region", [float(b) for b in self.breaks], self.cells]]


def combine(regions: Sequence[Region], rule: Callable[[Iterator[bool]], bool]) -> Region:
    """The region whose cells follow by `rule` from those of the given regions."""
    breaks: list[Any] = []
    for b in sorted(b for region in regions for b in region.breaks):
        if not breaks or b - breaks[-1] > M.mpf(10) ** -30 * (1 + abs(b)):
            breaks.append(b)
    # Breaks that differ only by rounding become one, so that no test point falls between them.
    regions = [Region([min(breaks, key=lambda c: abs(c - b)) for b in r.breaks], r.cells) for r in regions]
    inside = [(a + b) / 2 for a, b in itertools.pairwise(breaks)]
    if not breaks:
        return Region([], [rule(region.cells[0] for region in regions)])
    points = [breaks[0] - 1, *(x for pair in zip(breaks, [*inside, breaks[-1] + 1], strict=True) for x in pair)]
    return Region(breaks, [rule(region.holds(x) for region in regions) for x in points])


def from_ratio(ratio: Ratio, kind: Callable[[int, int], Any]) -> Region:
    """The region where a quotient is in the given relation to zero."""
    zeros, poles = real_only(ratio.roots()), real_only(find_roots(ratio.bottom))
    breaks = sorted([*zeros, *poles])
    distinct = [b for i, b in enumerate(breaks) if not i or b - breaks[i - 1] > M.mpf(10) ** -12 * (1 + abs(b))]
    ends = [distinct[0] - 1, *distinct, distinct[-1] + 1] if distinct else [M.mpf(-1), M.mpf(1)]
    cells = []
    for i, (a, b) in enumerate(itertools.pairwise(ends)):
        top, bottom = ratio.at((a + b) / 2)
        sign = M.sign(top * bottom) if trim(ratio.top) else 0
        cells.append(bool(kind(int(sign), 0)))
        if i < len(distinct):
            is_zero = any(abs(distinct[i] - z) <= M.mpf(10) ** -12 * (1 + abs(z)) for z in zeros)
            cells.append(is_zero and bool(kind(0, 0)))
    return Region(distinct, cells)


def find_region(item: Any) -> Region:
    """The region of a set or of relations in one symbol; raises UnknownError for others."""
    if isinstance(item, Relational):
        if len(item.free_symbols) != 1 or item.has(AppliedUndef):
            raise UnknownError
        return from_ratio(as_ratio(difference(item, str(next(iter(item.free_symbols))).lower(), 0)), type(item))
    if isinstance(item, sympy.Interval):
        return _interval_region(item)
    if isinstance(item, sympy.FiniteSet):
        return combine([Region([_real(x)], [False, True, False]) for x in item.args], any)
    if item is sympy.S.EmptySet or item is sympy.S.Reals:
        return Region([], [item is sympy.S.Reals])
    if isinstance(item, (sympy.Union, sympy.Intersection)):
        return combine([find_region(part) for part in item.args], any if isinstance(item, sympy.Union) else all)
    if isinstance(item, sympy.And) and len(item.free_symbols) == 1:
        return combine([find_region(part) for part in item.args], all)
    if isinstance(item, sympy.Complement):
        return combine([find_region(part) for part in item.args], lambda inside: next(inside) and not next(inside))
    raise UnknownError


def _real(item: Any) -> Any:
    """The value of a real number."""
    if item.free_symbols or item.has(AppliedUndef):
        raise UnknownError
    value = evaluate(item, 0, {})
    if not isinstance(value, M.mpf):
        raise UnknownError
    return value


def _interval_region(item: Any) -> Region:
    """The region between two numbers."""
    parts = []
    if item.start != -sympy.oo:
        parts.append(Region([_real(item.start)], [False, not item.left_open, True]))
    if item.end != sympy.oo:
        parts.append(Region([_real(item.end)], [True, not item.right_open, False]))
    return combine(parts, all) if parts else Region([], [True])
