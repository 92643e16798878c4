"""Threads that fit the machine: how many CPUs this process may use, and threads that wait without using one.

Only the standard library is imported at the top, so that a command can set what torch reads as it loads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath

# What users set by themselves, and what is then left alone.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def wait_passively(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets OpenMP's threads sleep soon at barriers, unless the environment says how they wait; ahead of torch's import.

    By default they spin: beside other work each spins away the time slice in which the one that it waits for could run.
    Sleep without a spin doubles the step of an idle machine (docs/LOG.md).
    """
    if not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = "50000"


def limit_threads(threads: int | None = None) -> None:
    """Sets torch's number of threads; for None to the CPUs at hand where torch would take more, and OMP_NUM_THREADS
    or MKL_NUM_THREADS do not name a number.
    """
    import torch

    if threads is None and not any(name in os.environ for name in COUNTS):
        threads = min(torch.get_num_threads(), available_cpus())
    if threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def available_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may keep busy: of its affinity, and within the quotas of its cgroups, rounded down.

    Args:
        root: folder of /proc and of what is mounted.

    Returns:
        At least 1.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([affinity, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """CPUs that each cgroup of this process, and each one around it, leaves it."""
    memberships = dict(_memberships(root))
    for kind, controllers, inner, mount in _mounts(root):
        if kind == "cgroup2":
            path = memberships.get("")
        else:
            path = memberships.get("cpu") if "cpu" in controllers else None
        if path is None:
            continue
        folder = root / mount.lstrip("/")
        # A container sees part of the tree, `inner`, at the mount; what it can not see counts at the mount itself.
        below = PurePosixPath(path)
        parts = below.relative_to(inner).parts if below.is_relative_to(inner) else ()
        for depth in range(len(parts) + 1 if ".." not in parts else 1):
            quota = _quota(folder.joinpath(*parts[:depth]))
            if quota is not None:
                yield quota


def _memberships(root: Path) -> Iterator[tuple[str, str]]:
    """Controller and path of each cgroup of this process; the controller of version 2 is ""."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, path


def _mounts(root: Path) -> Iterator[tuple[str, list[str], str, str]]:
    """Version, options, path inside of the tree and mount point of each mounted tree of cgroups."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, *rest) = before.split(), after.split() or [""]
        if kind in ("cgroup", "cgroup2"):
            inner, mount = (_unescaped(field) for field in fields[3:5])
            yield kind, rest[-1].split(","), inner, mount


def _quota(folder: Path) -> float | None:
    """CPUs' worth of time that one cgroup has, None without a limit."""
    limit, _, period = _read(folder / "cpu.max").strip().partition(" ")
    if not limit:
        limit, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    # "max" in version 2, -1 in version 1.
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() and int(period) else None


def _unescaped(field: str) -> str:
    """A field of mountinfo, whose blanks are octal."""
    return field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")


def _read(path: Path) -> str:
    """A file's text, empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
