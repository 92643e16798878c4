"""Compares answers by their fingerprints. Answers that math-verify finds equal always may be equal here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

# Ten times math-verify's rounding, absolute and relative.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprint of one answer, or of one part of it, from `mgrpo.grading.fingerprint`."""

    texts: frozenset[str]
    kinds: tuple[tuple[Any, ...], ...]  # the kind's name, then its parts
    right_sides: tuple[Fingerprint, ...]  # of equations, compared where the other answer is no equation


def read_fingerprint(alternatives: Sequence[Any]) -> Fingerprint:
    """Parses the worker's reply."""
    texts = frozenset(alternative[1] for alternative in alternatives if alternative[0] == "text")
    kinds = tuple(_read(*alternative) for alternative in alternatives if alternative[0] not in ("text", "right side"))
    sides = tuple(read_fingerprint(alternative[1]) for alternative in alternatives if alternative[0] == "right side")
    return Fingerprint(texts, kinds, sides)


def _read(kind: str, *rest: Any) -> tuple[Any, ...]:
    """One alternative; parts that are answers become fingerprints."""
    if kind == "number":
        return kind, _read_values(rest[0])
    if kind in ("equation", "inequality"):
        solutions = {name: roots and list(map(_read_values, roots)) for name, roots in rest[2].items()}
        return kind, *rest[:2], solutions
    if kind in ("set", "tuple", "chain"):
        return kind, tuple(map(read_fingerprint, rest[0]))
    if kind == "interval":
        return kind, *rest[:2], *map(read_fingerprint, rest[2:])
    if kind == "matrix":
        return kind, *rest[:2], tuple(map(read_fingerprint, rest[2]))
    return kind, *rest


def _read_values(values: Sequence[Any]) -> tuple[complex | None, ...]:
    """Numbers, where a pair is a complex one."""
    return tuple(complex(*value) if isinstance(value, list) else value for value in values)


def may_be_equal(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two answers may be equal; False is certain. Symmetric."""
    if not one.texts.isdisjoint(other.texts) or any(_may_match(a, b) for a in one.kinds for b in other.kinds):
        return True
    return any(
        _may_be_only_element(a, b) or any(may_be_equal(side, replace(b, right_sides=())) for side in a.right_sides)
        for a, b in ((one, other), (other, one))
    )


def _may_match(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two alternatives may be the same thing."""
    first, second = one[0], other[0]
    if first == second:
        return _SAME_KIND[first](one, other)
    kinds = {first, second}
    if "any" in kinds:
        return True
    if "some set" in kinds:
        return not kinds.isdisjoint({"set", "region", "interval"})
    return kinds == {"set", "tuple"} and len(one[1]) == len(other[1]) and _cover(one[1], other[1])


def _may_be_only_element(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether the other may be a set or a tuple with this answer as its only element."""
    things = tuple(kind for kind in one.kinds if kind[0] not in ("set", "tuple"))
    whole = replace(one, kinds=things)
    return bool(things) and any(
        _cover([whole], kind[1])
        for kind in other.kinds
        if kind[0] == "set" or (kind[0] == "tuple" and len(kind[1]) == 1)
    )


def _close(one: complex | None, other: complex | None) -> bool:
    """Whether two values are the same up to rounding; None matches anything."""
    if one is None or other is None or one == other:
        return True
    distance = abs(one - other)
    return distance <= TOLERANCE * max(1.0, abs(one), abs(other)) and distance < math.inf


def _cover(one: Sequence[Any], other: Sequence[Any], same: Callable[[Any, Any], bool] = may_be_equal) -> bool:
    """Whether every element of either list may equal one of the other."""
    return all(any(same(a, b) for b in other) for a in one) and all(any(same(a, b) for a in one) for b in other)


def _match_sets(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return _cover(one[1], other[1])


def _match_in_order(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Tuples, and matrices of one shape."""
    (*shape, elements), (*other_shape, others) = one, other
    return shape == other_shape and len(elements) == len(others) and all(map(may_be_equal, elements, others))


def _match_relations(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two relations have the same strictness and the same real solutions for every symbol.

    A symbol that a relation lacks has no solutions. Where both relations certainly have real solutions, they must share
    a solution for some symbol, real or not.
    """
    (strict, real, solutions), (other_strict, other_real, other_solutions) = one[1:], other[1:]
    if strict != other_strict:
        return False
    shared = not (real and other_real)
    for name in solutions.keys() | other_solutions.keys():
        first, second = solutions.get(name, _NO_ROOTS), other_solutions.get(name, _NO_ROOTS)
        if first is None or second is None:
            shared = True
        elif not all(map(_match_real_roots, first, second)):
            return False
        else:
            shared = shared or all(any(_close(a, b) for a in x for b in y) for x, y in zip(first, second, strict=True))
    return shared


def _match_real_roots(one: Sequence[complex], other: Sequence[complex]) -> bool:
    """Whether every real root of either is close to one of the other."""
    return _cover(*([x for x in roots if not isinstance(x, complex)] for roots in (one, other)), same=_close)


_NO_ROOTS: list[list[complex]] = [[], []]
_SAME_KIND: dict[str, Callable[[tuple[Any, ...], tuple[Any, ...]], bool]] = {
    "number": lambda one, other: all(map(_close, one[1], other[1])),
    "any": lambda one, other: True,
    "some set": lambda one, other: False,
    "set": _match_sets,
    "chain": _match_sets,
    "tuple": _match_in_order,
    "matrix": _match_in_order,
    "interval": lambda one, other: one[1:3] == other[1:3] and all(map(may_be_equal, one[3:], other[3:])),
    "region": lambda one, other: one[2] == other[2] and all(map(_close, one[1], other[1])),
    "equation": _match_relations,
    "inequality": _match_relations,
}
