"""Replaces functions of other packages by ours, and restores them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Self


class Replacement(NamedTuple):
    """A name and its replacement."""

    owner: Any  # a module or a class
    name: str
    new: Any


class Patch:
    """Replaces names at once; `undo`, or leaving the `with` block, restores them.

    Args:
        replacements: names and new objects. `new` must take the arguments of what it replaces.

    Raises:
        AttributeError: a name is missing.
        TypeError: `new` does not take the arguments of what it replaces.

    In either case nothing is replaced.
    """

    def __init__(self, replacements: Sequence[Replacement]):
        for replacement in replacements:
            check_signature(replacement)
        # The entry of the class's __dict__, so that a static method is restored as one.
        self._before = [(*r, inspect.getattr_static(r.owner, r.name)) for r in replacements]
        for owner, name, new in replacements:
            setattr(owner, name, new)

    def undo(self) -> None:
        """Restores the names, also in modules that have imported them since; a second call does nothing."""
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
    """Raises if the name is missing or the replacement does not take its arguments."""
    owner, name, new = replacement
    old = getattr(owner, name, None)
    if old is None:
        raise AttributeError(f"patch: {_name(owner)} must have {name!r}, got none. Its version is not supported.")
    wanted, known = arguments(old), arguments(new)
    if missing := [argument for argument in wanted if argument not in known]:
        raise TypeError(
            f"patch: {_name(owner)}.{name} must take {known}, got also {missing}. Its version is not supported."
        )


def arguments(function: Any) -> list[str]:
    """Names of the arguments of a function, or of an autograd function's forward."""
    if hasattr(function, "apply"):
        with_context = getattr(function, "forward", None)
        return list(inspect.signature(with_context or function.apply).parameters)[with_context is not None :]
    return list(inspect.signature(function).parameters)


def loaded_modules(package: str) -> list[ModuleType]:
    """The imported modules of a package."""
    return [
        module
        for name, module in sorted(sys.modules.items())
        if isinstance(module, ModuleType) and name.partition(".")[0] == package
    ]


def replace_everywhere(function: Callable[..., Any], new: Callable[..., Any], package: str) -> list[Replacement]:
    """Replacements of a function under every name that it has in a package's imported modules."""
    return [
        Replacement(module, name, new)
        for module in loaded_modules(package)
        for name, value in vars(module).items()
        if value is function
    ]


def _name(owner: Any) -> str:
    """Dotted name of a module or a class."""
    return owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
