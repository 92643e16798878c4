"""The fingerprint of a parsed answer: its kinds, and its values at fixed points of the free symbols.

Runs in the worker, on math-verify's parse; `mgrpo.grading.matching.may_be_equal` compares two fingerprints. Every
reading that math-verify may give an answer is one alternative: 50% is 50 and 0.5, an equation is also its right side,
an open interval also a pair. A part that cannot be computed is left open and matches anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from mgrpo.grading.evaluation import NUM_POINTS, difference, evaluate, spell, value_at
from mgrpo.grading.ratio import M, UnknownError, as_ratio, real_only
from mgrpo.grading.region import Region, combine, find_region

ANY: list[Any] = ["any"]
MATRICES = (sympy.MatrixBase, sympy.MatrixExpr)


def fingerprint(items: Sequence[Any]) -> list[Any]:
    """The alternatives of one answer for JSON: those of every item that math-verify compares."""
    return [alternative for item in items for alternative in _alternatives(item)]


def _alternatives(item: Any) -> list[Any]:
    """Every kind that math-verify may take the item for."""
    if isinstance(item, str):
        return [["text", item.strip()]]
    for kind, describe in _KINDS:
        if isinstance(item, kind):
            try:
                return describe(item)
            except (MemoryError, RecursionError):
                raise
            except Exception:
                return [ANY]
    return [ANY]


def _describe_number(item: Any) -> list[Any]:
    """The values of a scalar, and its spelling, because math-verify compares symbols as text."""
    nodes = list(sympy.preorder_traversal(item))
    if not all(isinstance(node, (sympy.Expr, sympy.Tuple)) and not isinstance(node, MATRICES) for node in nodes):
        return [ANY]
    found = [["number", _values(item)]]
    if item.is_Mul and len(item.args) == 2 and item.args[1] == sympy.UnevaluatedExpr(sympy.Rational(1, 100)):
        found.append(["number", _values(item.args[0])])
    return found + _spelling(item)


def _is_product(item: Any) -> bool:
    """Whether the item is a product of symbols, as math-verify reads words."""
    return item.is_Mul and all(factor.is_Symbol or factor is sympy.E for factor in item.args)


def _spelling(item: Any) -> list[Any]:
    """The text that math-verify compares symbols by; a product of symbols is joined letter by letter."""
    return [["text", "".join(map(str, item.args if _is_product(item) else [item])).lower()]]


def _values(item: Any) -> list[Any]:
    """The value at each point; None where it is unknown, or not real although there are symbols."""
    sign = {sympy.oo: 1, -sympy.oo: -1}.get(item)
    if sign:
        return [sign * math.inf] * NUM_POINTS
    if not item.free_symbols and not item.has(AppliedUndef):
        return [value_at(item, 0)] * NUM_POINTS
    values = [value_at(item, k) for k in range(NUM_POINTS)]
    return [None if isinstance(value, list) else value for value in values]


def _describe_set(item: Any) -> list[Any]:
    """A finite set by its elements, an interval by its ends, and any set as a region."""
    if isinstance(item, sympy.FiniteSet):
        found: list[Any] = [["set", [_alternatives(element) for element in item.args]]]
        if item.args and all(isinstance(element, (Relational, sympy.And)) for element in item.args):
            found += _describe_region(lambda: combine([find_region(element) for element in item.args], any), [])
        return found
    if isinstance(item, sympy.Interval):
        ends = [_alternatives(item.start), _alternatives(item.end)]
        found = [["interval", bool(item.left_open), bool(item.right_open), *ends]]
        found += [["tuple", ends]] if item.left_open and item.right_open else []
        return found + _describe_region(lambda: find_region(item), [] if item.free_symbols else [ANY])
    return _describe_region(lambda: find_region(item), [ANY])


def _describe_region(make: Callable[[], Region], otherwise: list[Any]) -> list[Any]:
    """The alternatives of a region, `otherwise` where it is unknown."""
    try:
        return make().describe()
    except UnknownError:
        return otherwise


def _solutions(item: Any) -> dict[str, Any]:
    """The solutions for each symbol at two points of the other symbols, None where they are unknown.

    Two equations are equal to math-verify where they differ by a sign, or where `solve` finds the same for the first
    symbols that it can solve for; it drops solutions that are real nowhere.
    """
    symbols = item.free_symbols | item.atoms(AppliedUndef)
    solutions = {}
    for name in sorted({str(symbol).lower() for symbol in symbols}):
        try:
            solutions[name] = [as_ratio(difference(item, name, k)).roots() for k in (0, 1)]
        except UnknownError:
            solutions[name] = None
    return solutions


def _has_real_solution(item: Any, solutions: dict[str, Any]) -> bool:
    """Whether a relation certainly holds, or has its border, at a real point: at a root, or where the sign changes."""
    known = [roots for roots in solutions.values() if roots is not None]
    if any(real_only(at_point) for roots in known for at_point in roots):
        return True
    if not solutions or len(known) < len(solutions) or not all(all(roots) for roots in known):
        return False
    # The centre of a circle that the points miss.
    centre = {name: roots[0][0].real for name, roots in solutions.items()}
    try:
        signs = [M.sign(evaluate(item.lhs, 0, given) - evaluate(item.rhs, 0, given)) for given in ({}, centre)]
    except UnknownError:
        return False
    return signs[0] * signs[1] < 0


def _describe_relation(item: Any) -> list[Any]:
    """An equation by its solutions and right side, an inequality by its border; both as a region too."""
    kind, solutions = "equation" if isinstance(item, sympy.Eq) else "inequality", _solutions(item)
    strict, real = isinstance(item, (sympy.Lt, sympy.Gt, sympy.Ne)), _has_real_solution(item, solutions)
    spelled = {name: roots and [list(map(spell, at_point)) for at_point in roots] for name, roots in solutions.items()}
    found: list[Any] = [[kind, strict, real, spelled]]
    if kind == "equation":
        found.append(["right side", _alternatives(item.rhs)])
    if isinstance(item.lhs, sympy.Expr) and isinstance(item.rhs, sympy.Expr):
        sides = (item.lhs - item.rhs, item.rhs - item.lhs)
        found += [text for side in sides if side.is_Symbol or _is_product(side) for text in _spelling(side)]
    # A relation in two symbols is no set, unless one of them cancels; f(x) < 3 has one symbol. An assignment is read as
    # its right side.
    if item.has(AppliedUndef) or sum(bool(roots and all(roots)) for roots in solutions.values()) < 2:
        is_assignment = kind == "equation" and _is_assigned(item.lhs)
        found += _describe_region(lambda: find_region(item), [] if is_assignment else [["some set"]])
    return found


def _is_assigned(item: Any) -> bool:
    """Whether math-verify reads an equation with this left side as an assignment."""
    from latex2sympy2_extended import is_expr_of_only_symbols  # slow, but loaded by now

    return is_expr_of_only_symbols(item)


def _describe_chain(item: Any) -> list[Any]:
    """A chain of equations by its ends, to which math-verify cuts it; any chain by its parts and as a region."""
    parts = list(getattr(item, "_unsorted_args", item.args))
    if not all(isinstance(part, Relational) for part in parts):
        return [ANY]
    found: list[Any] = [["chain", [_describe_relation(part) for part in parts]]]
    if all(isinstance(part, sympy.Eq) for part in parts):
        found += _describe_relation(sympy.Eq(parts[0].lhs, parts[-1].rhs, evaluate=False))
        if _is_assigned(parts[0].lhs):
            return found
    return found + _describe_region(lambda: find_region(item), [["some set"]])


def _describe_matrix(item: Any) -> list[Any]:
    """A matrix by its shape and elements; a single row or column is a tuple too."""
    elements = [_alternatives(element) for element in item.flat()]
    return [["matrix", *item.shape, elements], *([["tuple", elements]] if 1 in item.shape else [])]


_KINDS: list[tuple[Any, Callable[[Any], list[Any]]]] = [
    (sympy.MatrixBase, _describe_matrix),
    (sympy.MatrixExpr, lambda item: [ANY]),
    (sympy.Set, _describe_set),
    (sympy.Tuple, lambda item: [["tuple", [_alternatives(element) for element in item.args]]]),
    (Relational, _describe_relation),
    (sympy.And, _describe_chain),
    (sympy.Expr, _describe_number),
]
