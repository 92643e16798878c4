"""Fields of option groups with their bounds, and types of paths."""

from __future__ import annotations

import dataclasses
import math
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec


def _at_home(kind: Any, metavar: str) -> Any:
    """Parser of a path on a command line: `~` and `~user` at its start are home folders, as in a shell."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: kind(os.path.expanduser(words[0])),
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


HomeText = Annotated[str, _at_home(str, "STR")]
"""A path or another name, which never begins with `~`."""
HomePath = Annotated[Path, _at_home(Path, "PATH")]


def option(
    default: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    resumable: bool = False,
) -> Any:
    """A field of a group.

    Args:
        default: value of the field.
        least, above: inclusive or exclusive lower bound.
        most, below: inclusive or exclusive upper bound; infinity by default.
        resumable: whether a resumed run may have another value, because the option does not affect results.
    """
    bounds = None
    if not (least is above is most is below is None):
        low = least if least is not None else -math.inf if above is None else above
        high = most if most is not None else math.inf if below is None else below
        bounds = (low, high, least is not None, most is not None)
    return dataclasses.field(default=default, metadata={"bounds": bounds, "resumable": resumable})


RESUMABLE = {"bounds": None, "resumable": True}


def resumable_names(group: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of options, and names of whole groups, that a resumed run may change; `group` is a class."""
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        if field.metadata.get("resumable"):
            yield prefix + field.name
        elif dataclasses.is_dataclass(hints[field.name]):
            yield from resumable_names(hints[field.name], f"{prefix}{field.name}.")


def fields_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Dotted name, value and field of every option of a configuration, nested groups included."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, field


def flag(name: str) -> str:
    """The command-line flag of a dotted field name."""
    return "--" + name.replace("_", "-")


def range_problem(name: str, value: Any, field: dataclasses.Field[Any]) -> str | None:
    """A message if a number is outside its bounds."""
    bounds = field.metadata.get("bounds")
    if bounds is None or value is None or isinstance(value, str):
        return None
    low, high, low_included, high_included = bounds
    above = value >= low if low_included else value > low
    below = value <= high if high_included else value < high
    if above and below:
        return None
    interval = f"{'[' if low_included else '('}{low:g}, {high:g}{']' if high_included else ')'}"
    return f"{flag(name)} must be in {interval}, got {value}."


def range_problems(config: Any) -> list[str]:
    """A message for each number outside its bounds."""
    found = (range_problem(name, value, field) for name, value, field in fields_of(config))
    return [f"config: {problem}" for problem in found if problem]
