"""Host memory of a process: of the machine, or of the cgroups around it."""

from __future__ import annotations

import pytest
from cgroups import v1, v2

from mgrpo.process.memory import HostMemory, host_memory

MIB = 2**20
MEMINFO = "MemTotal:       8192 kB\nMemFree:        1024 kB\nMemAvailable:   4096 kB\nHugePages_Total:       0\n"


def with_machine(root):
    (root / "proc/meminfo").write_text(MEMINFO)
    return root


def test_without_a_limit_it_is_the_machines(tmp_path):
    root = with_machine(v2(tmp_path, {"memory.max": "max", "memory.current": "5"}))
    assert host_memory(root) == HostMemory(8 * MIB, 4 * MIB)


@pytest.mark.parametrize("limit", ["9223372036854771712", "-1"])
def test_no_limit_of_version_one(tmp_path, limit):
    root = with_machine(v1(tmp_path, {"memory.limit_in_bytes": limit}, controllers="memory"))
    assert host_memory(root) == HostMemory(8 * MIB, 4 * MIB)


def test_the_lowest_limit_around_it_counts_and_caches_are_free(tmp_path):
    files = {"a/memory.max": str(6 * MIB), "a/memory.current": str(5 * MIB), "a/b/memory.max": "max"}
    files["a/memory.stat"] = f"anon 1\ninactive_file {2 * MIB}\nactive_file 7"
    root = with_machine(v2(tmp_path, files, path="/a/b"))
    assert host_memory(root) == HostMemory(6 * MIB, 3 * MIB)


def test_a_limit_of_version_one(tmp_path):
    files = {"memory.limit_in_bytes": str(2 * MIB), "memory.usage_in_bytes": str(3 * MIB)}
    files["memory.stat"] = f"inactive_file 0\ntotal_inactive_file {2 * MIB}"
    root = with_machine(v1(tmp_path, files, controllers="memory"))
    assert host_memory(root) == HostMemory(2 * MIB, 1 * MIB)


def test_a_system_that_does_not_say(tmp_path):
    assert host_memory(tmp_path) == HostMemory(None, None)


def test_this_machine():
    memory = host_memory()
    assert memory.total and memory.free and 2**28 < memory.free <= memory.total
