"""Number of CPUs and threads of this process, and OpenMP's wait policy.

Torch is not imported at the top, so that a command can set variables that torch reads on import.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

from mgrpo.process.cgroups import cgroup_folders, read_text

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


def limit_threads(threads: int | None = None, *, sharing: int = 1) -> None:
    """Sets torch's number of threads.

    None limits it to the available CPUs, unless OMP_NUM_THREADS or MKL_NUM_THREADS is set.

    Args:
        threads: number of threads of this process.
        sharing: processes of the run on this machine, of which each takes its share of the CPUs.
    """
    import torch

    if threads is None and not any(name in os.environ for name in COUNTS):
        threads = min(torch.get_num_threads(), max(1, available_cpus() // sharing))
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
    quotas = map(_quota, cgroup_folders("cpu", root))
    return max(1, int(min([affinity, *(quota for quota in quotas if quota is not None)])))


def _quota(folder: Path) -> float | None:
    """The quota of one cgroup in CPUs, None without a limit."""
    limit, _, period = read_text(folder / "cpu.max").strip().partition(" ")
    if not limit:
        limit, period = (read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    # "max" in version 2, -1 in version 1.
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() and int(period) else None
