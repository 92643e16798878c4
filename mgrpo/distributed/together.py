"""What all ranks do at once, or rank 0 for all, with one outcome: an error of one is raised on all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mgrpo import errors
from mgrpo.distributed.world import World
from mgrpo.errors import ConfigError, EngineError, PeerError


def on_first(world: World, question: Callable[[], Any]) -> Any:
    """The JSON value that a function returns on rank 0, on every rank; its error is raised on all."""
    if world.size == 1:
        return question()
    value, error = None, None
    if world.is_first:
        try:
            value = question()
        except (ValueError, RuntimeError, OSError) as problem:
            error = problem
    value, described = world.broadcast([value, _described(error)])
    _raise(error, described)
    return value


@contextmanager
def failing_together(world: World) -> Iterator[None]:
    """After the block, raises an engine's error on all ranks where any has one: its own, or the lowest rank's."""
    error: EngineError | None = None
    try:
        yield
    except EngineError as problem:
        error = problem
    own = None if isinstance(error, PeerError) else error
    found = [other for other in world.gather_json(_described(own)) if other]
    _raise(own if found else error, found[0] if found else None)


def _described(error: Exception | None) -> list[Any] | None:
    """Class and message of an error, as JSON; all messages of a ConfigError."""
    if error is None:
        return None
    return [type(error).__name__, error.problems if isinstance(error, ConfigError) else str(error)]


def _raise(own: Exception | None, described: list[Any] | None) -> None:
    """Raises this rank's error, or one like another rank's."""
    if own is not None:
        raise own
    if described is not None:
        name, text = described
        raise getattr(errors, name, EngineError)(text)
