"""What a launcher says of this process in environment variables; needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

# Variables of torchrun, which libraries read too.
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
_REMEDY = " Unset it in the environment, or start with torchrun."
_PREFIXES = ("MASTER_", "ROLE_", "TORCHELASTIC_")


def number(name: str, default: int) -> int:
    """An environment variable as a number, or the default if it is unset or not a number."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def local_size() -> int:
    """Processes of the run on this machine, at least 1."""
    return max(1, number("LOCAL_WORLD_SIZE", 1))


def launcher_problems() -> list[str]:
    """A message for each variable of a launcher that is no number, or no place among the processes."""
    problems = []
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        given = {name: os.environ[name] for name in (rank, size) if os.environ.get(name)}
        wrong = [name for name, value in given.items() if not value.isdecimal() or (name == size and int(value) == 0)]
        for name in wrong:
            least = "above 0" if name == size else "of 0 or more"
            problems.append(f"run: {name} must be an integer {least}, got {given[name]}.{_REMEDY}")
        if not wrong and rank in given and (size in given or size == "WORLD_SIZE"):
            most = number(size, 1)
            if int(given[rank]) >= most:
                problems.append(f"run: {rank} must be below {size} ({most}), got {given[rank]}.{_REMEDY}")
    return problems


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables for a child process that is not one of the run's."""
    return {name: value for name, value in environment.items() if name not in _NAMES and not name.startswith(_PREFIXES)}
