"""Signals: a run that is asked to end, by whom and whenever it is, saves first and says that it can go on."""

from __future__ import annotations

import fcntl
import os
import pty
import random
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import mgrpo
from mgrpo.errors import EngineError, Exit, StaleWeightsError
from mgrpo.grading.worker import EquivalenceWorker
from mgrpo.process import signals as interrupt
from mgrpo.process.disk import list_checkpoints, step_of
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.rollout.vllm.process import _before_start
from mgrpo.run import checkpoint
from mgrpo.run.checkpoint import newest_valid
from mgrpo.training.grader import Grader
from mgrpo.training.observers import Evaluator
from mgrpo.training.trainer import Trainer

ALL = [*interrupt.REQUESTS, *interrupt.WARNINGS]
INT, TERM, HUP, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(mgrpo.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def steps_saved(run_dir: Path) -> list[int]:
    return [step_of(folder) for folder in list_checkpoints(run_dir)]


@pytest.fixture
def sending(monkeypatch):
    """Sends signals from within a method, the first time that it is called (at a step, where one is given)."""

    def install(owner, name, *numbers, step=None):
        real, sent = getattr(owner, name), []

        def method(self, *args, **options):
            if not sent and step in (None, getattr(args[0], "step", None) if args else None):
                sent.append(numbers)
                send(*numbers)
            return real(self, *args, **options)

        monkeypatch.setattr(owner, name, method)

    return install


@pytest.mark.fault("SIGHUP, SIGUSR1 and others within a step")
@pytest.mark.parametrize("number", ALL)
def test_each_signal_saves_the_step(launch, sending, tmp_path, number):
    before = [signal.getsignal(one) for one in ALL]
    sending(Grader, "assign_credit", number, step=2)
    assert launch({"steps": 4}) == Exit.INTERRUPTED and steps_saved(tmp_path / "run") == [2]
    assert [signal.getsignal(one) for one in ALL] == before


def test_a_run_that_was_hung_up_goes_on_to_the_same_rows(launch, resume, sending, tmp_path, rows_of):
    sending(Grader, "assign_credit", HUP, step=2)
    assert launch({"steps": 4}) == Exit.INTERRUPTED
    assert resume() == Exit.DONE
    assert launch({"steps": 4}, run_dir=tmp_path / "straight") == Exit.DONE
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "straight")


def test_signals_after_the_end_are_ignored_for_good():
    """A launcher ends the other processes once one has ended; they keep their exit code."""
    before = [signal.getsignal(one) for one in ALL]
    try:
        handler = interrupt.Interrupt()
        with handler.handled():
            handler.defer()
            handler.finish()
            send(TERM, TERM, INT, USR1)
        assert not handler.asked and {signal.getsignal(one) for one in ALL} == {signal.SIG_IGN}
    finally:
        for one, former in zip(ALL, before, strict=True):
            signal.signal(one, former)


@pytest.mark.fault("signals again and again")
@pytest.mark.parametrize("numbers", [[HUP] * 3, [HUP, TERM], [USR1, TERM, HUP, USR1], [TERM, TERM], [INT, USR1]])
def test_warnings_and_one_request_save(launch, sending, tmp_path, numbers):
    """A dying terminal hangs up more than once, a scheduler warns and then ends, timeout(1) sends SIGTERM twice."""
    sending(Grader, "assign_credit", *numbers)
    assert launch({"steps": 5}) == Exit.INTERRUPTED and steps_saved(tmp_path / "run") == [1]


@pytest.mark.fault("a second SIGINT or SIGTERM")
@pytest.mark.parametrize("numbers", [[INT, INT], [TERM, INT], [INT, TERM], [HUP, TERM, INT], [TERM, TERM]])
def test_a_second_request_ends_at_once(launch, sending, tmp_path, numbers, monkeypatch):
    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(interrupt, "REPEAT_S", 0.0)
    sending(Grader, "assign_credit", *numbers)
    with pytest.raises(Ended, match=r"^130$"):
        launch({"steps": 5})
    assert steps_saved(tmp_path / "run") == []


@pytest.mark.fault("a signal while a checkpoint is written, a probe evaluated, the last step taken")
@pytest.mark.parametrize("background", ["", "no-"])
def test_a_signal_during_other_work_saves_too(launch, sending, tmp_path, background):
    options, flag = {"steps": 9, "checkpoint.every": 2}, f"--checkpoint.{background}background"
    sending(checkpoint, "save_checkpoint", HUP)
    assert launch(options, flag) == Exit.INTERRUPTED
    assert newest_valid(tmp_path / "run")[1] == {} and steps_saved(tmp_path / "run")[-1] in (2, 3)
    sending(Evaluator, "evaluate", USR1)
    run_dir, probe = tmp_path / "probe", {"data.probe": "arithmetic:4:2-2:1", "eval.every": 3}
    assert launch(options | probe, flag, run_dir=run_dir) == Exit.INTERRUPTED and steps_saved(run_dir)[-1] == 3
    sending(Grader, "assign_credit", HUP, step=2)
    assert launch({"steps": 2}, run_dir=tmp_path / "last") == Exit.DONE


@pytest.mark.fault("a signal before the first step")
@pytest.mark.parametrize("number", [INT, TERM, HUP, USR1])
def test_a_signal_while_a_run_loads_ends_it_there(launch, resume, sending, tmp_path, number, capsys):
    """Nothing is lost, no directory is left, and the same command or --resume starts it."""
    sending(Trainer, "_longest", number)
    assert launch() == Exit.INTERRUPTED and not (tmp_path / "run").exists()
    assert "interrupted before the first step; start with --resume" in " ".join(capsys.readouterr().out.split())
    assert launch({}, "--stop-after", "1") == Exit.DONE
    sending(Trainer, "restore", number)
    assert resume() == Exit.INTERRUPTED and steps_saved(tmp_path / "run") == [1]
    assert resume() == Exit.DONE and steps_saved(tmp_path / "run") == [1, 3]


def test_a_signal_whose_exception_is_lost_is_not(launch, monkeypatch, tmp_path):
    """Python drops what is raised in a destructor."""
    longest = Trainer._longest

    class Dying:
        def __del__(self):
            send(HUP)
            sum(range(1000))

    def dying(self):
        thing = Dying()
        del thing
        return longest(self)

    monkeypatch.setattr(Trainer, "_longest", dying)
    monkeypatch.setattr(sys, "unraisablehook", lambda hook: None)
    assert launch() == Exit.INTERRUPTED and steps_saved(tmp_path / "run") == []


@pytest.mark.fault("nohup: hang-ups are ignored from the start")
@pytest.mark.parametrize("number", interrupt.WARNINGS)
def test_a_warning_that_is_ignored_at_the_start_stays_ignored(launch, sending, number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        sending(Grader, "assign_credit", number)
        assert launch({"steps": 2}) == Exit.DONE
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.fault("an engine that is ended with the run")
@pytest.mark.parametrize("step", [1, 3])
def test_an_engine_that_dies_of_the_same_signal_is_no_other_fault(launch, resume, tmp_path, step, monkeypatch):
    real, calls = TransformersEngine.generate, []

    def generate(self, *args):
        calls.append(args)
        if len(calls) == 2 * step:
            send(TERM)
            raise EngineError("generate: the server must answer, it is gone.")
        return real(self, *args)

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    assert launch({"steps": 5}) == Exit.INTERRUPTED and steps_saved(tmp_path / "run") == [2] * (step > 1)
    assert resume() == Exit.DONE


def test_other_weights_are_that_fault_whatever_was_sent(launch, monkeypatch):
    real = TransformersEngine.generate

    def generate(self, prompts, n, sampling, tag):
        if sampling.max_new_tokens == 1:  # the trial before the first step
            return real(self, prompts, n, sampling, tag)
        send(TERM)
        raise StaleWeightsError("generate: weights must be others.")

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    assert launch({"steps": 5}) == Exit.ENGINE


@pytest.mark.fault("a warning to every process of a run")
def test_workers_and_servers_leave_warnings_to_the_trainer():
    worker = EquivalenceWorker(timeout_s=20)
    try:
        assert worker.compare("1", "1")
        pid = worker.pid or 0
        for number in (INT, HUP, USR1, signal.SIGUSR2):
            os.kill(pid, number)
        assert worker.compare("2", "2.0") and worker.pid == pid
    finally:
        worker.close()
    with subprocess.Popen(["sleep", "60"], preexec_fn=_before_start) as server:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{server.pid}/status").read_text().splitlines())
        server.terminate()  # which is no warning
    ignored = int(status["SigIgn"], 16)
    assert all(ignored & 1 << number - 1 for number in interrupt.WARNINGS) and server.returncode == -TERM


def start(flags: list[str], **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "mgrpo.train", *flags], env=ENVIRONMENT, **options)


def wait_for_rows(process: subprocess.Popen, run_dir: Path, rows: int) -> None:
    end, metrics = time.monotonic() + 120, run_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < rows:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.fault("a signal while Python loads the modules of a run")
@pytest.mark.parametrize("number", [TERM, HUP, USR1])
def test_a_signal_ahead_of_everything(tmp_path, number):
    process = start(["--run-dir", str(tmp_path / "run")])
    status, end = Path(f"/proc/{process.pid}/status"), time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        caught = int(status.read_text().partition("SigCgt:")[2].split()[0], 16)
        if caught & 1 << number - 1:
            break
    process.send_signal(number)
    assert process.wait(60) == Exit.INTERRUPTED and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.fault("hang-ups without end, to a process")
def test_hang_ups_until_the_process_is_gone(command_line, tmp_path, resume):
    """At times that know nothing of the run, to the very end of the process."""
    run_dir, rng = tmp_path / "run", random.Random(7)
    process = start(command_line(run_dir, {"steps": 100000, "checkpoint.every": 2}), stdout=subprocess.DEVNULL)
    try:
        wait_for_rows(process, run_dir, 2)
        while process.poll() is None:
            process.send_signal(rng.choice([HUP, HUP, USR1]))
            time.sleep(rng.random() * 0.1)
    finally:
        process.kill()
    assert process.returncode == Exit.INTERRUPTED
    newest, complaints = newest_valid(run_dir)
    rows = (run_dir / "metrics.jsonl").read_text().count("\n")
    assert newest is not None and step_of(newest) == rows and not complaints
    assert resume("--stop-after", str(rows + 1)) == Exit.DONE


@pytest.mark.slow
@pytest.mark.fault("a terminal that goes away under a run")
def test_a_terminal_that_is_closed(command_line, tmp_path):
    """The kernel hangs up the run and refuses what it prints."""
    run_dir = tmp_path / "run"
    master, slave = pty.openpty()
    process = start(
        command_line(run_dir, {"steps": 100000}),
        **{name: slave for name in ("stdin", "stdout", "stderr")},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    os.set_blocking(master, False)
    try:
        while process.poll() is None and not (run_dir / "metrics.jsonl").exists():
            time.sleep(0.05)
        wait_for_rows(process, run_dir, 1)
        os.close(master)
        assert process.wait(60) == Exit.INTERRUPTED
    finally:
        process.kill()
    newest, _ = newest_valid(run_dir)
    assert newest is not None and step_of(newest) == (run_dir / "metrics.jsonl").read_text().count("\n")
