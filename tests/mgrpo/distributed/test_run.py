"""Whole runs of two processes: how they end, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_training import deterministic, make_flags

from mgrpo.process.disk import list_checkpoints, step_of
from mgrpo.run.checkpoint import newest_valid

SUPPORT = Path(__file__).parents[2] / "support"
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{SUPPORT.parents[1]}:{SUPPORT}", "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAIN, WORLD_TRAIN = ["-m", "mgrpo.train"], [str(SUPPORT / "world_train.py")]
# In tree mode any number of processes has the same bits.
OPTIONS = {"steps": 5, "checkpoint.every": 2, "distributed.reduce": "tree"}


def launcher(run_dir: Path, restarts: int = 0) -> list[str]:
    """Our launcher on a program."""
    return [sys.executable, str(SUPPORT / "launch_program.py"), "2", str(restarts), str(run_dir)]


def begin(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output and error."""
    out, error = process.communicate(timeout=400)
    return process.returncode, out, error


def run(*command: str) -> tuple[int, str, str]:
    return finish(begin(*command))


def steps_saved(run_dir: Path) -> list[int]:
    assert newest_valid(run_dir)[1] == {}
    return [step_of(folder) for folder in list_checkpoints(run_dir)]


def rows(run_dir: Path) -> list[dict]:
    return [deterministic(json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def exit_file(run_dir: Path) -> dict:
    return json.loads((run_dir / "exit.json").read_text())


@pytest.mark.slow
def test_wrong_arguments_are_named_once_before_anything_starts(tmp_path):
    flags = make_flags(tmp_path / "run", {"distributed.processes": 2, "data.train": tmp_path / "none.jsonl"})
    code, out, error = run(sys.executable, *TRAIN, *flags)
    assert (code, out) == (2, "") and error.count("none.jsonl") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_of_one_rank_is_the_one_shown(tmp_path):
    run_dir = tmp_path / "run"
    code, out, error = run(*launcher(run_dir), *WORLD_TRAIN, "raise:1:3", *make_flags(run_dir, OPTIONS))
    assert code == 1 and "step 1/5" in out
    assert error.startswith("rank 1 of 2:\nTraceback") and error.endswith("ValueError: a fault of rank 1\n")
    assert error.count("Traceback") == 1 and "closed by peer" not in error
    assert exit_file(run_dir) == {"code": 1, "name": "error", "rank": 1, "error": "a fault of rank 1"}
    assert steps_saved(run_dir) == [2] and time.time() - (run_dir / "exit.json").stat().st_mtime < 30


@pytest.mark.slow
def test_a_signal_to_one_process_under_torchrun_saves_and_leaves_the_code(tmp_path):
    run_dir = tmp_path / "run"
    code, out, error = run(*TORCHRUN, *WORLD_TRAIN, "SIGHUP:1:3", *make_flags(run_dir, OPTIONS))
    assert code == 1  # torchrun's
    assert exit_file(run_dir) == {"code": 75, "name": "interrupted", "rank": 0, "error": None}
    assert steps_saved(run_dir) == [2, 3] and out.count("checkpoint of step 3") == 1
    assert "mgrpo/run/loop.py" not in error  # no traceback of the run's own


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_the_run_goes_on(tmp_path):
    """Up to the rows of a run of one process."""
    run_dir, alone = tmp_path / "run", tmp_path / "alone"
    process = begin(*launcher(run_dir), *WORLD_TRAIN, "slow:1:2", *make_flags(run_dir, OPTIONS))
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()) and process.poll() is None:
        time.sleep(0.05)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
    code, out, error = finish(process)
    assert (code, error) == (75, "") and "checkpoint of step" in out
    resumed = [*make_flags(run_dir, OPTIONS), "--resume", "--distributed.max-restarts", "1"]
    # Killed on the way: the second attempt takes up the newest checkpoint by itself.
    code, out, error = run(*launcher(run_dir, restarts=1), *WORLD_TRAIN, "SIGKILL:0:5", *resumed)
    assert code == 0 and exit_file(run_dir)["code"] == 0
    lines = error.splitlines()
    assert lines[0] == "rank 0 was ended by SIGKILL." and lines[1].startswith("All processes start again, 1 of 1")
    assert len(lines) == 2 and out.count("resume: step") == 2
    assert run(sys.executable, *WORLD_TRAIN, "none", *make_flags(alone, OPTIONS))[0] == 0
    assert rows(run_dir) == rows(alone) and steps_saved(run_dir)[-1] == 5
