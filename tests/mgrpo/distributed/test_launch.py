"""The launcher, with a small program in place of training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mgrpo.distributed.launch import OWN_STORE

SUPPORT = Path(__file__).parents[2] / "support"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != OWN_STORE}
ENVIRONMENT |= {"PYTHONPATH": str(SUPPORT.parents[1]), "OMP_NUM_THREADS": "1"}


def begin(folder: Path, mode: str, *arguments: str, restarts: int = 0, **environment: str) -> subprocess.Popen[str]:
    """Starts two processes of the program."""
    command = [sys.executable, SUPPORT / "launch_program.py", "2", str(restarts), folder]
    command += [SUPPORT / "world_program.py", folder, mode, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=ENVIRONMENT | environment, text=True, **pipes)


def finish(launcher: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and all output of the launcher."""
    out, error = launcher.communicate(timeout=120)
    return launcher.returncode, out + error


def run(folder: Path, mode: str, *arguments: str, **options) -> tuple[int, str]:
    return finish(begin(folder, mode, *arguments, **options))


def noted(folder: Path) -> dict[str, dict]:
    """What the processes have written, by attempt and rank."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))}


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("code", [0, 75])
def test_the_exit_code_is_the_runs_own_and_outcomes_are_final(tmp_path, code):
    assert run(tmp_path, str(code), "a b", "$$x $y ${local_rank}", restarts=2) == (code, "")
    places = noted(tmp_path)
    assert list(places) == ["0-0", "0-1"]  # one attempt
    assert {place["MASTER_ADDR"] for place in places.values()} == {"127.0.0.1"}
    for rank in range(2):
        place = places[f"0-{rank}"]
        assert [place[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == [
            *(str(rank), str(rank)),
            *("2", "2"),
        ]
        assert place["arguments"] == ["a b", "$$x $y ${local_rank}"]


def test_a_killed_worker_ends_all_with_one_line(tmp_path):
    assert run(tmp_path, "kill") == (1, "rank 1 was ended by SIGKILL.\n")
    assert time.time() - (tmp_path / "0-1.json").stat().st_mtime < 30
    assert not any(is_running(place["pid"]) for place in noted(tmp_path).values())
    assert json.loads((tmp_path / "exit.json").read_text()) == {
        "code": 1,
        "name": "error",
        "rank": 1,
        "error": "rank 1 was ended by SIGKILL",
    }


def test_a_worker_that_does_not_end_is_killed(tmp_path):
    assert run(tmp_path, "hang", STOP_S="1") == (5, "")
    assert not any(is_running(place["pid"]) for place in noted(tmp_path).values())


def test_a_failure_is_restarted_as_often_as_asked(tmp_path):
    """The second attempt ends with another code, which is final."""
    code, output = run(tmp_path, "fail", restarts=3)
    assert (code, output) == (4, "All processes start again, 1 of 3 times, from the newest checkpoint.\n")
    assert set(noted(tmp_path)) == {"0-0", "0-1", "1-0", "1-1"}


def test_restarts_come_to_an_end(tmp_path):
    code, output = run(tmp_path, "kill", restarts=1)
    again = "All processes start again, 1 of 1 times, from the newest checkpoint."
    assert (code, output.splitlines()) == (1, ["rank 1 was ended by SIGKILL.", again, "rank 1 was ended by SIGKILL."])


def test_a_signal_goes_on_to_the_workers_and_nothing_is_restarted(tmp_path):
    launcher = begin(tmp_path, "wait", restarts=2)
    wait_for(lambda: len(list(tmp_path.glob("*.waits"))) == 2)
    launcher.send_signal(signal.SIGUSR1)
    assert finish(launcher) == (75, "") and list(noted(tmp_path)) == ["0-0", "0-1"]


def test_a_signal_to_one_worker_ends_all(tmp_path):
    launcher = begin(tmp_path, "wait")
    wait_for(lambda: len(list(tmp_path.glob("*.waits"))) == 2)
    os.kill(noted(tmp_path)["0-1"]["pid"], signal.SIGTERM)
    assert finish(launcher) == (75, "")


def test_workers_do_not_outlive_the_launcher(tmp_path):
    launcher = begin(tmp_path, "wait")
    wait_for(lambda: len(list(tmp_path.glob("*.waits"))) == 2)
    launcher.kill()
    launcher.communicate(timeout=60)
    wait_for(lambda: not any(is_running(place["pid"]) for place in noted(tmp_path).values()))


def test_restarted_workers_meet_again(tmp_path):
    """Rank 1 is killed after all have met; the second attempt has a store of its own."""
    code, _ = run(tmp_path, "gloo", restarts=1)
    assert code == 0 and (tmp_path / "total").read_text() == "2.0"
    places = noted(tmp_path)
    assert {place["store is shared"] for place in places.values()} == {"False"}
    assert places["0-0"]["MASTER_PORT"] != places["1-0"]["MASTER_PORT"]


def test_a_shared_store_would_outlive_the_attempt(tmp_path):
    """Why the variable is set: without it both attempts share one store, with the addresses of dead processes."""
    run(tmp_path, "fail", restarts=1, **{OWN_STORE: "0"})
    places = noted(tmp_path)
    assert {place["store is shared"] for place in places.values()} == {"True"}
    assert places["0-0"]["MASTER_PORT"] == places["1-0"]["MASTER_PORT"]
