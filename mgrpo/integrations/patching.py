"""Names in other packages that lead to our functions for a while."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Self


class Replacement(NamedTuple):
    """One name and what it is to stand for."""

    owner: Any  # a module or a class
    name: str
    new: Any


class Patch:
    """Replaces names at once; `undo`, or leaving the `with` block, gives them back.

    Args:
        replacements: names and what they become. `new` has to take the arguments of what it replaces.

    Raises:
        AttributeError: a name is not there.
        TypeError: `new` could not be called as its predecessor is.

    In either case nothing is replaced.
    """

    def __init__(self, replacements: Sequence[Replacement]):
        for replacement in replacements:
            check_signature(replacement)
        # A class's own entry, so that a static method is given back as one.
        self._before = [(*r, inspect.getattr_static(r.owner, r.name)) for r in replacements]
        for owner, name, new in replacements:
            setattr(owner, name, new)

    def undo(self) -> None:
        """Gives the names back, also where a module has imported them since; a second call does nothing."""
        before, self._before = self._before, []
        for owner, name, _, old in reversed(before):
            setattr(owner, name, old)
        for owner, name, new, old in before:
            for module in loaded_modules(_name(owner).partition(".")[0]):
                if vars(module).get(name) is new:
                    setattr(module, name, old)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def check_signature(replacement: Replacement) -> None:
    """Raises where the name is absent, or its arguments are not those that the replacement takes."""
    owner, name, new = replacement
    old = getattr(owner, name, None)
    if old is None:
        raise AttributeError(f"patch: {_name(owner)} must have {name!r}, got none. Its version is not one we know.")
    wanted, known = arguments(old), arguments(new)
    if missing := [argument for argument in wanted if argument not in known]:
        raise TypeError(
            f"patch: {_name(owner)}.{name} must take {known}, got also {missing}. Its version is not one we know."
        )


def arguments(function: Any) -> list[str]:
    """Names of a function's arguments, or of those that an autograd function is applied to."""
    if hasattr(function, "apply"):
        with_context = getattr(function, "forward", None)
        return list(inspect.signature(with_context or function.apply).parameters)[with_context is not None :]
    return list(inspect.signature(function).parameters)


def loaded_modules(package: str) -> list[ModuleType]:
    """Modules of a package that have been imported so far."""
    return [
        module
        for name, module in sorted(sys.modules.items())
        if isinstance(module, ModuleType) and name.partition(".")[0] == package
    ]


def replace_everywhere(function: Callable[..., Any], new: Callable[..., Any], package: str) -> list[Replacement]:
    """Replacements of a function under every name by which a package's loaded modules have it."""
    return [
        Replacement(module, name, new)
        for module in loaded_modules(package)
        for name, value in vars(module).items()
        if value is function
    ]


def _name(owner: Any) -> str:
    """Dotted name of a module or a class."""
    return owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
