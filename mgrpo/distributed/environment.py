"""What a launcher says of this process in environment variables; needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

# Variables of torchrun, which libraries read too.
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
_PREFIXES = ("MASTER_", "ROLE_", "TORCHELASTIC_")


def number(name: str, default: int) -> int:
    """An environment variable as a number, or the default if it is unset or not a number."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def local_size() -> int:
    """Processes of the run on this machine, at least 1."""
    return max(1, number("LOCAL_WORLD_SIZE", 1))


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables for a child process that is not one of the run's."""
    return {name: value for name, value in environment.items() if name not in _NAMES and not name.startswith(_PREFIXES)}
