"""Whole runs of two processes: how they end, and what they leave."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import call, deterministic, make_flags

from mgrpo.errors import Exit
from mgrpo.process.disk import list_checkpoints, step_of
from mgrpo.run.checkpoint import newest_valid

SUPPORT = Path(__file__).parents[2] / "support"
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{SUPPORT.parents[1]}:{SUPPORT}", "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAIN, WORLD_TRAIN = ["-m", "mgrpo.train"], [str(SUPPORT / "world_train.py")]
# In tree mode any number of processes has the same bits. Every metric has values within the first 20 steps.
OPTIONS = {
    "steps": 30,
    "threads": 1,
    "distributed.reduce": "tree",
    "checkpoint.every": 2,
    "data.train": "arithmetic:64:2-3:0",
    "data.probe": "arithmetic:6:2-3:9",
    "eval.every": 10,
    "log.kl_initial_every": 10,
    "monitor.retention_every": 10,
}
WEIGHTS = ("policy/model.safetensors", "momentum/model.safetensors", "optimizer.safetensors")


def launcher(run_dir: Path, restarts: int = 0) -> list[str]:
    """Our launcher on a program."""
    return [sys.executable, str(SUPPORT / "launch_program.py"), "2", str(restarts), str(run_dir)]


def begin(*command: str, **environment: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=ENVIRONMENT | environment, text=True, **pipes)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output and error."""
    out, error = process.communicate(timeout=1200)
    return process.returncode, out, error


def run(*command: str, **environment: str) -> tuple[int, str, str]:
    return finish(begin(*command, **environment))


def steps_saved(run_dir: Path) -> list[int]:
    assert newest_valid(run_dir)[1] == {}
    return [step_of(folder) for folder in list_checkpoints(run_dir)]


def rows(run_dir: Path) -> list[dict]:
    return [deterministic(json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(run_dir: Path) -> list[bytes]:
    """Of the newest checkpoint: policy, momentum model, optimiser."""
    newest = list_checkpoints(run_dir)[-1]
    return [(newest / name).read_bytes() for name in WEIGHTS]


def exit_file(run_dir: Path) -> dict:
    return json.loads((run_dir / "exit.json").read_text())


def flags(run_dir: Path, options: dict[str, Any] = OPTIONS) -> list[str]:
    return make_flags(run_dir, options, preset="arithmetic")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The directory of a run of one process."""
    run_dir, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    assert call(flags(run_dir)) == 0
    torch.set_num_threads(threads)
    return run_dir


@pytest.mark.slow
def test_wrong_arguments_are_named_once_before_anything_starts(tmp_path):
    options = {"distributed.processes": 2, "data.train": tmp_path / "none.jsonl"}
    code, out, error = run(sys.executable, *TRAIN, *flags(tmp_path / "run", options))
    assert (code, out) == (2, "") and error.count("none.jsonl") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_of_one_rank_is_the_one_shown(tmp_path):
    run_dir = tmp_path / "run"
    code, out, error = run(*launcher(run_dir), *WORLD_TRAIN, "raise:1:3", *flags(run_dir))
    assert code == 1 and "step 1/30" in out
    assert error.startswith("rank 1 of 2:\nTraceback") and error.endswith("ValueError: a fault of rank 1\n")
    assert error.count("Traceback") == 1 and "closed by peer" not in error
    assert exit_file(run_dir) == {"code": 1, "name": "error", "rank": 1, "error": "a fault of rank 1"}
    assert steps_saved(run_dir) == [2] and time.time() - (run_dir / "exit.json").stat().st_mtime < 30


@pytest.mark.slow
@pytest.mark.fault("kill -9 of one of two processes before they share a run directory")
def test_a_process_killed_at_the_start_is_the_one_named(tmp_path):
    code, _, error = run(*launcher(tmp_path), *WORLD_TRAIN, "SIGKILL:1:0", *flags(tmp_path))
    assert (code, error) == (1, "rank 1 was ended by SIGKILL.\n")


@pytest.mark.slow
def test_a_signal_to_one_process_under_torchrun_saves_and_leaves_the_code(tmp_path):
    run_dir = tmp_path / "run"
    code, out, error = run(*TORCHRUN, *WORLD_TRAIN, "SIGHUP:1:3", *flags(run_dir))
    assert code == 1  # torchrun's
    assert exit_file(run_dir) == {"code": 75, "name": "interrupted", "rank": 0, "error": None}
    assert steps_saved(run_dir) == [2, 3] and out.count("checkpoint of step 3") == 1
    assert "mgrpo/run/loop.py" not in error  # no traceback of the run's own


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_the_run_goes_on(tmp_path, alone):
    """Up to the rows of a run of one process."""
    run_dir = tmp_path / "run"
    process = begin(*launcher(run_dir), *WORLD_TRAIN, "slow:1:2", *flags(run_dir))
    metrics = run_dir / "metrics.jsonl"
    while not count_rows(metrics) and process.poll() is None:
        time.sleep(0.05)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
    code, out, error = finish(process)
    assert (code, error) == (75, "") and "checkpoint of step" in out
    code, out, error = run(*launcher(run_dir), *WORLD_TRAIN, "none", *flags(run_dir), "--resume", "--stop-after", "5")
    assert (code, error) == (0, "") and out.count("resume: step") == 1 and exit_file(run_dir)["code"] == 0
    assert rows(run_dir) == rows(alone)[:5] and steps_saved(run_dir)[-1] == 5


def workers_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of the workers of a launcher, by rank."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        with suppress(OSError):
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    found[int(entry.removeprefix(b"RANK="))] = int(pid)
    return found


def count_rows(metrics: Path) -> int:
    return metrics.read_text().count("\n") if metrics.exists() else 0


def kill_at_random(process: subprocess.Popen[str], metrics: Path, draws: random.Random, most_rows: int) -> int:
    """Kills a worker of two while they start, or after up to `most_rows` more rows; returns its rank."""
    rank, starts = draws.randrange(2), draws.random() < 0.25
    left, before = draws.randint(1, most_rows), count_rows(metrics)
    while not starts and left > 0:
        assert process.poll() is None
        now = count_rows(metrics)
        left, before = left - max(0, now - before), now  # a restart cuts them back to its checkpoint
        time.sleep(0.01)
    time.sleep(draws.uniform(0, 6 if starts else 0.5))
    os.kill(workers_of(process)[rank], signal.SIGKILL)
    return rank


def run_killed(run_dir: Path, options: dict[str, Any], kills: int) -> None:
    """A run that ends well although its workers are killed."""
    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"CHAOS_SEED={seed}")
    draws, killed, seen = random.Random(seed), [], set()
    process = begin(*launcher(run_dir, restarts=kills), *WORLD_TRAIN, "none", *flags(run_dir, options))
    for _ in range(kills):
        while len(pids := set(workers_of(process).values()) - seen) < 2:
            assert process.poll() is None, finish(process)
            time.sleep(0.02)
        seen |= pids
        killed.append(kill_at_random(process, run_dir / "metrics.jsonl", draws, options["steps"] // (kills + 1)))
    code, out, error = finish(process)
    assert code == 0 and exit_file(run_dir)["code"] == 0, out + error
    assert [line for line in error.splitlines() if "was ended by" in line] == [
        f"rank {rank} was ended by SIGKILL." for rank in killed
    ]
    assert error.count("All processes start again") == kills


@pytest.mark.slow
@pytest.mark.fault("kill -9 of one of two processes, twice")
def test_a_run_killed_twice_ends_with_the_bits_of_one_process(tmp_path, alone):
    """30 steps of the arithmetic preset: rows, weights, momentum model and moments."""
    run_killed(tmp_path, OPTIONS, kills=2)
    assert len(rows(tmp_path)) == 30 and rows(tmp_path) == rows(alone)
    assert weights(tmp_path) == weights(alone)


@pytest.mark.long
@pytest.mark.fault("kill -9 of one of two processes again and again")
def test_a_run_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    options = OPTIONS | {"steps": 100, "distributed.reduce": "default"}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run(*launcher(straight), *WORLD_TRAIN, "none", *flags(straight, options))[0] == 0
    run_killed(killed, options, kills=8)
    assert len(rows(killed)) == 100 and rows(killed) == rows(straight)
    assert weights(killed) == weights(straight)


@pytest.mark.slow
@pytest.mark.fault("disk full for one of two processes")
@pytest.mark.parametrize("size", [300_000, 0])
def test_a_full_disk_of_one_rank_costs_one_checkpoint(tmp_path, alone, size):
    """Of size 0, not even the error can be written down for rank 0, which waits for the part until it is killed."""
    command = [*launcher(tmp_path), *WORLD_TRAIN, f"full={size}:1:4", *flags(tmp_path)]
    code, _, error = run(*command, STOP_S="5")
    assert time.time() - (tmp_path / "exit.json").stat().st_mtime < 30
    assert code == Exit.STORAGE and len(error.splitlines()) == 1 and "File too large" in error
    assert error.count("step_4 could not be written") == error.count("Earlier ones are unchanged") == 1
    assert not size or exit_file(tmp_path)["code"] == Exit.STORAGE
    assert steps_saved(tmp_path) == [2]
    assert call([*flags(tmp_path), "--resume", "--stop-after", "6"]) == 0
    assert rows(tmp_path) == rows(alone)[:6] and steps_saved(tmp_path)[-1] == 6


# Sampled accuracy on the eval set of four runs of one process, seeds 0 to 3: least and most at each step.
ACCURACY = {20: (0.487, 0.503), 40: (0.526, 0.533), 60: (0.554, 0.562), 80: (0.568, 0.577), 100: (0.554, 0.578)}


@pytest.mark.long
def test_a_hundred_steps_of_two_processes_learn_as_much_as_those_of_one(tmp_path):
    options = [
        "--steps",
        "100",
        "--eval.every",
        "20",
        "--threads",
        "1",
        "--log.backends",
        "--distributed.processes",
        "2",
    ]
    code, _, error = run(sys.executable, *TRAIN, "arithmetic", "--run-dir", str(tmp_path), *options)
    assert (code, error) == (0, "")
    found = {row["step"]: row["probe_accuracy_policy"] for row in rows(tmp_path)}
    for step, (least, most) in ACCURACY.items():
        assert least - 0.02 <= found[step] <= most + 0.02
