"""How commands use the machine: threads that sleep at barriers, no more of them than there are CPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cgroups import machine, v1, v2

import mgrpo
from mgrpo.process.disk import list_checkpoints
from mgrpo.process.threads import COUNTS, WAITING, available_cpus, limit_threads, wait_passively

ROOT = Path(mgrpo.__file__).parents[1]


@pytest.fixture
def eight_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("max 100000", 8),
        ("100000 100000", 1),
        ("150000 100000", 1),
        ("200000 100000", 2),
        ("50000 100000", 1),
        ("350000 50000", 7),
        ("5000000 100000", 8),
        ("30000", 8),  # no period: not a quota
        ("", 8),
        ("0 0", 8),
    ],
)
def test_quota_of_version_two(tmp_path, quota, cpus):
    assert available_cpus(v2(tmp_path, {"cpu.max": quota})) == cpus


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("quota", "period", "cpus"),
    [
        ("-1", "100000", 8),
        ("100000", "100000", 1),
        ("150000", "100000", 1),
        ("30000", "10000", 3),
        ("1000", "100000", 1),
    ],
)
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_quota_of_version_one(tmp_path, quota, period, cpus, controllers):
    files = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": period}
    assert available_cpus(v1(tmp_path, files, controllers=controllers)) == cpus


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("limits", "cpus"),
    [
        ({"": "max 100000", "a": "300000 100000", "a/b": "max 100000", "a/b/c": "600000 100000"}, 3),
        ({"a": "max 100000", "a/b/c": "200000 100000"}, 2),
        ({"": "400000 100000"}, 4),
        ({"a/other": "100000 100000", "a/b/c/d": "100000 100000"}, 8),  # neither around it nor its own
    ],
)
def test_groups_in_groups(tmp_path, limits, cpus):
    files = {f"{folder}/cpu.max".lstrip("/"): text for folder, text in limits.items()}
    assert available_cpus(v2(tmp_path / "two", files, path="/a/b/c")) == cpus
    files = {}
    for folder, text in limits.items():
        quota, period = text.replace("max", "-1").split()
        files |= {f"{folder}/cpu.cfs_quota_us".lstrip("/"): quota, f"{folder}/cpu.cfs_period_us".lstrip("/"): period}
    assert available_cpus(v1(tmp_path / "one", files, path="/a/b/c")) == cpus


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("path", "inner", "where"),
    [
        ("/docker/0a1b", "/docker/0a1b", ""),  # a container that sees its own group alone, under the host's name
        ("/docker/0a1b/job", "/docker/0a1b", "job/"),
        ("/", "/", ""),  # with a namespace of its own
        ("/../../elsewhere", "/", ""),  # moved out of its namespace
        ("/kubepods/pod1", "/docker/0a1b", ""),
    ],
)
def test_containers(tmp_path, path, inner, where):
    assert available_cpus(v2(tmp_path / "two", {f"{where}cpu.max": "100000 100000"}, path=path, inner=inner)) == 1
    files = {f"{where}cpu.cfs_quota_us": "200000", f"{where}cpu.cfs_period_us": "100000"}
    assert available_cpus(v1(tmp_path / "one", files, path=path, inner=inner)) == 2


@pytest.mark.usefixtures("eight_cpus")
def test_other_mount_points_and_no_cgroups_at_all(tmp_path):
    assert available_cpus(v2(tmp_path / "moved", {"cpu.max": "100000 100000"}, mount="/run/my groups")) == 1
    assert available_cpus(tmp_path / "nothing") == 8
    assert available_cpus(machine(tmp_path / "no-mount", ["0::/"], [], {})) == 8


def test_affinity(tmp_path, monkeypatch):
    root = v2(tmp_path, {"cpu.max": "400000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert available_cpus(root) == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert available_cpus(root) == 4
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus(root) == 1


def test_this_machine():
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(("threads", "sharing", "expected"), [(None, 2, 4), (None, 3, 2), (None, 16, 1), (5, 2, 5)])
def test_processes_share_the_cpus(monkeypatch, threads, sharing, expected):
    for name in COUNTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("mgrpo.process.threads.available_cpus", lambda: 8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        limit_threads(threads, sharing=sharing)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("variables", "threads", "cpus", "expected"),
    [
        ({}, None, 1, 1),
        ({}, None, 2, 2),
        ({}, None, 64, 3),  # torch had chosen 3
        ({}, 5, 1, 5),
        ({"OMP_NUM_THREADS": "3"}, None, 1, 3),
        ({"MKL_NUM_THREADS": "3"}, None, 1, 3),
    ],
)
def test_number_of_threads(monkeypatch, variables, threads, cpus, expected):
    for name in COUNTS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mgrpo.process.threads.available_cpus", lambda: cpus)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        limit_threads(threads)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "50000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "10000"}, {"GOMP_SPINCOUNT": "10000"}),
        ({"OMP_WAIT_POLICY": ""}, {"OMP_WAIT_POLICY": ""}),
    ],
)
def test_how_threads_wait_is_the_users_choice(given, expected):
    wait_passively(environment := dict(given))
    assert environment == expected


# Stands for torch: tells what it would read as it loads, and ends the command there.
TELLS = "import os; print([os.environ.get(name) for name in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')]); os._exit(0)"


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [
        *(
            (["-m", f"mgrpo.{name}"], {}, [None, "50000"])
            for name in ("train", "evaluate", "doctor", "tasks.arithmetic")
        ),
        (["-u", "-W", "ignore", "-m", "mgrpo.train", "arithmetic"], {}, [None, "50000"]),
        (["-m", "mgrpo.train"], {"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", None]),
        (["-m", "mgrpo.train"], {"GOMP_SPINCOUNT": "9"}, [None, "9"]),
        (["-c", "import mgrpo.training.trainer"], {}, [None, None]),
        (["-m", "timeit", "-n1", "-r1", "import mgrpo.training.trainer"], {}, [None, None]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0] and value[0][0] == "-" else None,
)
def test_commands_decide_before_torch_is_loaded_and_libraries_do_not(tmp_path, command, given, expected):
    (tmp_path / "torch.py").write_text(TELLS)
    environment = {name: value for name, value in os.environ.items() if name not in WAITING} | given
    environment["PYTHONPATH"] = f"{tmp_path}:{ROOT}"
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=900
    )
    assert done.stdout.splitlines() == [str(expected)], done.stderr


def test_resume_says_where_the_number_of_threads_differs(launch, resume, tmp_path, capsys):
    assert launch({"steps": 3, "checkpoint.every": 1}, "--stop-after", "1") == 0
    state = list_checkpoints(tmp_path / "run")[-1] / "state.json"
    assert json.loads(state.read_text())["threads"] == 1
    before = torch.get_num_threads()
    capsys.readouterr()
    assert resume("--stop-after", "2") == 0
    assert "threads" not in capsys.readouterr().out
    torch.set_num_threads(before + 1)
    assert resume() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "threads" in line]
    (line,) = lines
    assert line == (
        f"resume: {before + 1} CPU threads, {before} before: the next steps differ in their last bits. "
        f"OMP_NUM_THREADS={before} repeats them."
    )
