"""Host memory that this process may use, and how much of it is free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mgrpo.process.cgroups import cgroup_folders, read_text


class HostMemory(NamedTuple):
    """Bytes of host memory; None where the system does not say."""

    total: int | None
    """The machine's, or the lowest limit of the process's cgroups."""
    free: int | None
    """What can still be taken of it, caches of files included."""


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Total and free host memory of this process; `root` is the folder that contains /proc and the mounts."""
    lines = (line.split() for line in read_text(root / "proc/meminfo").splitlines())
    machine = {name: 1024 * int(kib) for name, kib, *_ in lines}
    limits = list(_limits(root))
    totals = [machine.get("MemTotal:"), *(limit for limit, _ in limits)]
    frees = [machine.get("MemAvailable:"), *(max(limit - used, 0) for limit, used in limits)]
    total, free = (
        min((number for number in numbers if number is not None), default=None) for numbers in (totals, frees)
    )
    return HostMemory(total, free)


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each cgroup that has a limit, without caches of files that can be dropped."""
    for folder in cgroup_folders("memory", root):
        for limit_name, used_name, dropped in (
            ("memory.max", "memory.current", "inactive_file "),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
        ):
            limit = read_text(folder / limit_name).strip()
            if limit.isdigit() and int(limit) < 2**62:  # version 1 writes "no limit" as a number near 2^63
                used = int(read_text(folder / used_name).strip() or 0)
                stat = read_text(folder / "memory.stat").splitlines()
                caches = sum(int(line.split()[1]) for line in stat if line.startswith(dropped))
                yield int(limit), max(used - caches, 0)
