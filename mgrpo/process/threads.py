"""Number of CPUs and threads of this process, and OpenMP's wait policy.

Only the standard library is imported at the top, so that a command can set variables that torch reads on import.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath

# Variables that are left alone if the user has set them.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def wait_passively(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes OpenMP threads sleep soon at barriers, unless the environment sets it; call it before torch is imported.

    By default they spin, which on a busy machine uses the time slices of the threads that they wait for. Sleep without
    any spin doubles the time of a step on an idle machine (docs/LOG.md).
    """
    if not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = "50000"


def limit_threads(threads: int | None = None) -> None:
    """Sets torch's number of threads.

    None limits it to the available CPUs, unless OMP_NUM_THREADS or MKL_NUM_THREADS is set.
    """
    import torch

    if threads is None and not any(name in os.environ for name in COUNTS):
        threads = min(torch.get_num_threads(), available_cpus())
    if threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def available_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use, by its affinity and the quotas of its cgroups, rounded down.

    Args:
        root: folder that contains /proc and the mounts.

    Returns:
        At least 1.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([affinity, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quota of each cgroup of this process and of each parent."""
    memberships = dict(_memberships(root))
    for kind, controllers, inner, mount in _mounts(root):
        if kind == "cgroup2":
            path = memberships.get("")
        else:
            path = memberships.get("cpu") if "cpu" in controllers else None
        if path is None:
            continue
        folder = root / mount.lstrip("/")
        # A container sees only the part `inner` of the tree; the quota of the rest is at the mount itself.
        below = PurePosixPath(path)
        parts = below.relative_to(inner).parts if below.is_relative_to(inner) else ()
        for depth in range(len(parts) + 1 if ".." not in parts else 1):
            quota = _quota(folder.joinpath(*parts[:depth]))
            if quota is not None:
                yield quota


def _memberships(root: Path) -> Iterator[tuple[str, str]]:
    """Controller and path of each cgroup of this process; the controller is "" in version 2."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, path


def _mounts(root: Path) -> Iterator[tuple[str, list[str], str, str]]:
    """Version, options, path inside the tree and mount point of each mounted cgroup tree."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, *rest) = before.split(), after.split() or [""]
        if kind in ("cgroup", "cgroup2"):
            inner, mount = (_unescaped(field) for field in fields[3:5])
            yield kind, rest[-1].split(","), inner, mount


def _quota(folder: Path) -> float | None:
    """The quota of one cgroup in CPUs, None without a limit."""
    limit, _, period = _read(folder / "cpu.max").strip().partition(" ")
    if not limit:
        limit, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    # "max" in version 2, -1 in version 1.
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() and int(period) else None


def _unescaped(field: str) -> str:
    """A field of mountinfo with its octal escapes replaced."""
    return field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")


def _read(path: Path) -> str:
    """A file's text, empty if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
