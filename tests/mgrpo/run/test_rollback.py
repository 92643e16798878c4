"""Rollback: after an alarm a run goes back to where it was sound, and on with other prompts."""

from __future__ import annotations

import json
import os
import signal

import pytest

from mgrpo.errors import Exit
from mgrpo.observe.collapse import Monitor
from mgrpo.process.disk import list_checkpoints, step_of
from mgrpo.training.grader import Grader
from mgrpo.training.trainer import Trainer

# Windows of 2 steps: an alarm at step 9 makes step 5 the newest that is surely sound, and 4 its checkpoint.
ROLLING = {
    "steps": 14,
    "checkpoint.every": 2,
    "checkpoint.keep_last": 1,
    "monitor.on_collapse": "rollback",
    "monitor.max_rollbacks": 1,
    "monitor.window": 2,
    "data.train": "arithmetic:64:2-3:0",
}


@pytest.fixture
def alarm_at(monkeypatch):
    """Lets the monitor sound at a step, as often as is said, and never of its own accord."""

    def at(step: int, times: int) -> None:
        observe, sounded = Monitor.observe, []

        def sound(self, row):
            observe(self, row)
            self.first_alarm = None
            if row["step"] != step or row.get("alarm") is not None or len(sounded) >= times:
                return []
            sounded.append(step)
            self.first_alarm = step
            return ["planted"]

        monkeypatch.setattr(Monitor, "observe", sound)

    return at


@pytest.fixture
def prompts_of(monkeypatch):
    """Notes which prompts every step has seen, in order."""
    seen: list[tuple[int, tuple[int, ...]]] = []
    judge = Grader.assign_credit

    def note(self, batch, logprobs):
        seen.append((batch.step, tuple(prompt.index for prompt in batch.prompts)))
        return judge(self, batch, logprobs)

    monkeypatch.setattr(Grader, "assign_credit", note)
    return seen


def states(run_dir):
    """What each checkpoint says of its run, by step."""
    return {step_of(f): json.loads((f / "state.json").read_text()) for f in list_checkpoints(run_dir)}


def test_back_to_the_sound_checkpoint_and_on_with_other_prompts(
    launch, tmp_path, rows_of, alarm_at, prompts_of, capsys
):
    alarm_at(9, times=1)
    assert launch(ROLLING) == Exit.DONE
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 15))
    assert [row["rollbacks"] for row in rows] == [0] * 4 + [1] * 10
    steps, batches = zip(*prompts_of, strict=True)
    assert steps == (*range(1, 10), *range(5, 15))
    assert len({index for batch in batches[:16] for index in batch}) == 64, "the first epoch goes on"
    dropped = [json.loads(line) for line in (tmp_path / "run" / "rolled_back.jsonl").read_text().splitlines()]
    assert [row["step"] for row in dropped] == [5, 6, 7, 8, 9] and dropped[-1]["alarm"] == ["planted"]
    assert "rollback 1 of 1, from step 9 to 4: planted" in " ".join(capsys.readouterr().out.split())
    state = states(tmp_path / "run")[14]
    assert (state["train"]["rollbacks"], state["sampler"]["num_batches"]) == (1, 19)


def test_the_steps_after_it_start_from_the_weights_of_the_checkpoint(small, trained, launch, tmp_path, alarm_at):
    """A trainer put at the checkpoint, and its sampler where the alarm was, ends with the same weights."""
    alarm_at(9, times=1)
    assert launch(ROLLING) == Exit.DONE
    expected, _ = trained(small(ROLLING), 4)
    for _ in range(5):
        expected.sampler.next()
    list(expected.train(14))
    expected.save(tmp_path)
    for name in ("policy/model.safetensors", "momentum/model.safetensors", "optimizer.safetensors"):
        found = tmp_path / "run" / "checkpoints" / "step_14" / name
        assert (tmp_path / name).read_bytes() == found.read_bytes(), name


def test_after_the_last_rollback_an_alarm_stops_the_run(launch, tmp_path, rows_of, alarm_at):
    alarm_at(9, times=2)
    assert launch(ROLLING) == Exit.COLLAPSE
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["alarm"] == ["planted"] and [row["step"] for row in rows] == list(range(1, 10))


def test_an_early_alarm_goes_back_to_the_start(small, trained, launch, tmp_path, rows_of, alarm_at):
    """The optimiser too forgets what it has seen."""
    alarm_at(3, times=1)
    assert launch(ROLLING | {"checkpoint.every": 0}) == Exit.DONE
    assert [row["rollbacks"] for row in rows_of(tmp_path / "run")] == [1] * 14
    expected, _ = trained(small(ROLLING), 0)
    for _ in range(3):
        expected.sampler.next()
    list(expected.train(14))
    expected.save(tmp_path)
    for name in ("policy/model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "run" / "checkpoints" / "step_14" / name).read_bytes()


def test_tensorboard_forgets_the_steps_that_were_taken_back(launch, tmp_path, alarm_at):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    alarm_at(9, times=1)
    assert launch(ROLLING | {"log.backends": ("tensorboard",)}, "--log.backends", "tensorboard") == Exit.DONE
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("rollbacks")]
    assert found == [(step, float(step > 4)) for step in range(1, 15)]


def test_a_damaged_checkpoint_is_passed_over(launch, tmp_path, rows_of, alarm_at, monkeypatch):
    alarm_at(9, times=1)
    judge = Grader.assign_credit
    damaged = []

    def damage(self, batch, logprobs):
        if batch.step == 9 and not damaged:
            damaged.append(batch)
            (tmp_path / "run" / "checkpoints" / "step_4" / "state.json").write_text("{}")
        return judge(self, batch, logprobs)

    monkeypatch.setattr(Grader, "assign_credit", damage)
    assert launch(ROLLING | {"checkpoint.keep_best": 2}) == Exit.DONE
    assert [row["rollbacks"] for row in rows_of(tmp_path / "run")].count(0) == 2


def test_a_run_stopped_after_a_rollback_resumes_to_the_same_bits(launch, resume, tmp_path, rows_of, alarm_at):
    for name in ("straight", "run"):
        alarm_at(9, times=1)
        assert launch(ROLLING, *(["--stop-after", "11"] if name == "run" else []), run_dir=tmp_path / name) == 0
    assert resume("--stop-after", "14") == Exit.DONE
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "straight")
    assert states(tmp_path / "run")[14]["sampler"] == states(tmp_path / "straight")[14]["sampler"]


@pytest.mark.fault("SIGTERM while a run rolls back")
def test_a_signal_during_a_rollback_is_kept(launch, resume, tmp_path, rows_of, alarm_at, monkeypatch):
    alarm_at(9, times=1)
    restore = Trainer.restore

    def interrupted(self, folder):
        os.kill(os.getpid(), signal.SIGTERM)
        restore(self, folder)

    monkeypatch.setattr(Trainer, "restore", interrupted)
    assert launch(ROLLING) == Exit.INTERRUPTED
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4, 5]
    monkeypatch.setattr(Trainer, "restore", restore)
    assert resume() == Exit.DONE
    assert [row["rollbacks"] for row in rows_of(tmp_path / "run")] == [0] * 4 + [1] * 10


@pytest.mark.fault("kill -9 after a rollback")
def test_a_run_that_dies_after_a_rollback_does_not_go_the_same_way_again(
    launch, resume, tmp_path, rows_of, alarm_at, monkeypatch
):
    alarm_at(9, times=1)
    take = Trainer.train_step

    def die(self):
        if self.state.rollbacks:
            raise KeyboardInterrupt  # ends it at once, with nothing saved
        return take(self)

    monkeypatch.setattr(Trainer, "train_step", die)
    with pytest.raises(KeyboardInterrupt):
        launch(ROLLING)
    assert {step: state["train"]["rollbacks"] for step, state in states(tmp_path / "run").items()}[4] == 1
    monkeypatch.setattr(Trainer, "train_step", take)
    assert resume() == Exit.DONE
    assert [row["rollbacks"] for row in rows_of(tmp_path / "run")] == [0] * 4 + [1] * 10
