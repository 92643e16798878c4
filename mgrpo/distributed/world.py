"""Rank of this process and number of processes of a run."""

from __future__ import annotations

import os
from typing import NamedTuple

from mgrpo.errors import ConfigError


class World(NamedTuple):
    """Number of processes of a run, and the rank of this one."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    """Processes on this machine."""

    def require_one(self) -> None:
        """Raises ConfigError if a launcher has started several processes."""
        if self.size != 1:
            raise ConfigError([f"run: WORLD_SIZE must be 1, got {self.size}. A run is one process, without torchrun."])


def find_world() -> World:
    """The world from the environment variables of torchrun and other launchers; one process without them."""
    return World(_number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_WORLD_SIZE", 1))


def _number(name: str, default: int) -> int:
    """An environment variable as a number, or the default if it is unset or not a number."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default
