"""A run that samples ahead: the batch in flight is in its checkpoints, survives a kill, and a rollback drops it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from twin_engine import AHEAD, URLS, TwinEngine

from mgrpo.errors import EngineError, Exit
from mgrpo.observe.collapse import Monitor
from mgrpo.training.grader import Grader
from mgrpo.training.trainer import Trainer

OPTIONS = AHEAD | {
    "steps": 5,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 9,
    "optim.lr": 1e-3,
    "momentum.decay": 0.8,
    "data.train": "arithmetic:14:2-3:0",
    "monitor.retention_every": 2,
    "monitor.retention_prompts": 8,
    "rollout.parity_every": 2,
}
SERVERS = ("--engine.servers", *URLS)
FILES = ("policy/model.safetensors", "momentum/model.safetensors", "optimizer.safetensors")


@pytest.fixture
def engines(monkeypatch):
    """Lets every run have a slow TwinEngine; the list of them."""
    made = []

    def start(loaded, config, *, stop, **options):
        made.append(TwinEngine(loaded, delay_s=0.05, stop=stop))
        return made[-1]

    monkeypatch.setattr("mgrpo.training.trainer.start_engine", start)
    return made


def same_end(one, other, step):
    folders = [run / "checkpoints" / f"step_{step}" for run in (one, other)]
    return all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in FILES)


def in_flight(run_dir, step):
    """What a checkpoint holds of the batch after its step."""
    folder = run_dir / "checkpoints" / f"step_{step}"
    return json.loads((folder / "state.json").read_text()).get("rollouts"), folder / "rollouts.safetensors"


@pytest.mark.fault("kill -9 while a batch is in flight")
def test_a_run_that_is_killed_after_any_step_and_resumed_is_the_straight_one(
    launch, resume, tmp_path, rows_of, engines, monkeypatch
):
    """A kill leaves the folder as it was after a step; each of them is continued to the end. Nothing is pickled."""
    monkeypatch.setattr(pickle, "dumps", None)
    monkeypatch.setattr(pickle, "loads", None)
    assert launch(OPTIONS, *SERVERS, run_dir=tmp_path / "straight") == Exit.DONE
    straight = rows_of(tmp_path / "straight")
    assert [row["rollout_age"] for row in straight] == [0, 1, 1, 1, 1]
    for step in range(1, 5):
        killed = tmp_path / f"killed{step}"
        shutil.copytree(tmp_path / "straight", killed)
        for later in range(step + 1, 6):
            shutil.rmtree(killed / "checkpoints" / f"step_{later}")
        state, path = in_flight(killed, step)
        assert state["step"] == step + 1 and state["version"] == step - 1
        tensors = load_file(path)
        assert tensors["tokens"].shape == tensors["rollout_logprob"].shape and tensors["tokens"].shape[0] == 24
        assert resume(run_dir=killed) == Exit.DONE
        assert rows_of(killed) == straight, step
        assert same_end(killed, tmp_path / "straight", 5), step
    assert in_flight(tmp_path / "straight", 5) == (None, tmp_path / "straight/checkpoints/step_5/rollouts.safetensors")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollouts")]


def test_a_run_that_ends_early_keeps_its_batch_in_flight(launch, resume, tmp_path, rows_of, engines):
    """The engine of the second process generates nothing for the step that was in flight."""
    assert launch(OPTIONS | {"steps": 3}, *SERVERS, run_dir=tmp_path / "straight") == Exit.DONE
    assert launch(OPTIONS | {"steps": 3}, "--stop-after", "2", *SERVERS) == Exit.DONE
    assert resume("--stop-after", "3") == Exit.DONE
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "straight")
    assert engines[-1].events == []


@pytest.mark.fault("SIGTERM while a batch is in flight")
def test_a_signal_waits_for_the_batch_in_flight_and_keeps_it(launch, resume, tmp_path, rows_of, engines, monkeypatch):
    assert launch(OPTIONS, *SERVERS, run_dir=tmp_path / "straight") == Exit.DONE
    generate = TwinEngine.generate

    def ask(self, prompts, n, sampling, tag):
        if tag == ("policy", 1) and len(prompts) > 1 and len(engines) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(self, prompts, n, sampling, tag)

    monkeypatch.setattr(TwinEngine, "generate", ask)
    assert launch(OPTIONS | {"checkpoint.every": 0}, *SERVERS) == Exit.INTERRUPTED
    assert in_flight(tmp_path / "run", 2)[0]["step"] == 3
    assert resume() == Exit.DONE
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "straight")
    assert same_end(tmp_path / "run", tmp_path / "straight", 5)


def test_a_dry_run_tries_it_without_servers(launch, tmp_path):
    assert launch(OPTIONS, "--dry-run", *SERVERS) == Exit.DONE
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("rollout engine that dies while it generates ahead")
def test_an_engine_that_dies_ahead_costs_the_batch_in_flight(
    launch, resume, tmp_path, rows_of, engines, monkeypatch, capsys
):
    """The step whose batch is lost is resumed with rollouts by the weights of now."""
    generate = TwinEngine.generate

    def die(self, prompts, n, sampling, tag):
        if tag == ("momentum", 1) and len(engines) == 1 and len(prompts) > 1:
            raise EngineError("generate: it is gone.")
        return generate(self, prompts, n, sampling, tag)

    monkeypatch.setattr(TwinEngine, "generate", die)
    assert launch(OPTIONS, *SERVERS) == Exit.ENGINE
    assert "it is gone. Step 2 is saved." in " ".join(capsys.readouterr().err.split())
    assert in_flight(tmp_path / "run", 2)[0] is None
    assert resume() == Exit.DONE
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["rollout_age"] for row in rows] == [0, 1, 0, 1, 1]
    state = json.loads((tmp_path / "run/checkpoints/step_5/state.json").read_text())
    assert state["sampler"]["num_batches"] == 5, "the lost prompts were drawn again"


def test_a_step_that_fails_with_its_batch_in_hand_is_resumed_to_the_same_bits(
    launch, resume, tmp_path, rows_of, engines, monkeypatch, capsys
):
    assert launch(OPTIONS, *SERVERS, run_dir=tmp_path / "straight") == Exit.DONE
    assign_credit = Grader.assign_credit

    def die(self, batch, logprobs):
        if batch.step == 3 and len(engines) == 2:
            raise EngineError("no worker.")
        return assign_credit(self, batch, logprobs)

    monkeypatch.setattr(Grader, "assign_credit", die)
    assert launch(OPTIONS, *SERVERS) == Exit.ENGINE
    assert "no worker. Step 2 is saved." in " ".join(capsys.readouterr().err.split())
    assert resume() == Exit.DONE
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "straight")
    assert same_end(tmp_path / "run", tmp_path / "straight", 5)


@pytest.fixture
def alarm(monkeypatch):
    """Lets the monitor sound once, at step 5, with windows of 2 steps: back to step 1."""
    observe, sounded = Monitor.observe, []

    def sound(self, row):
        observe(self, row)
        self.first_alarm = None
        if row["step"] != 5 or row.get("alarm") is not None or sounded:
            return []
        sounded.append(5)
        self.first_alarm = 5
        return ["planted"]

    monkeypatch.setattr(Monitor, "observe", sound)


ROLLING = OPTIONS | {
    "steps": 7,
    "data.train": "arithmetic:64:2-3:0",
    "monitor.on_collapse": "rollback",
    "monitor.max_rollbacks": 1,
    "monitor.window": 2,
}


def test_a_rollback_drops_rollouts_in_flight_of_now_and_of_the_checkpoint(
    launch, resume, tmp_path, rows_of, engines, alarm, monkeypatch
):
    seen, assign_credit = [], Grader.assign_credit

    def note(self, batch, logprobs):
        seen.append((batch.step, batch.trajectories.version, tuple(prompt.index for prompt in batch.prompts)))
        return assign_credit(self, batch, logprobs)

    monkeypatch.setattr(Grader, "assign_credit", note)
    assert launch(ROLLING, *SERVERS) == Exit.DONE
    rows = rows_of(tmp_path / "run")
    back = next(step for step, row in enumerate(rows) if row["rollbacks"])
    assert [row["rollbacks"] for row in rows] == [0] * back + [1] * (7 - back) and 0 < back < 5
    steps, versions, batches = zip(*seen, strict=True)
    assert steps == (1, 2, 3, 4, 5, *range(back + 1, 8))
    assert versions[5:] == (back, *range(back, 6)), "by the weights of the checkpoint, then one step older each"
    assert len({index for batch in batches for index in batch}) == 4 * len(batches), "no prompt is lost or seen twice"
    assert [row["rollout_age"] for row in rows[back:]] == [0] + [1] * (6 - back)


@pytest.mark.fault("kill -9 after a rollback, with a batch in flight")
def test_a_run_that_is_killed_after_a_rollback_goes_on_as_it_would_have(
    launch, resume, tmp_path, rows_of, engines, alarm, monkeypatch
):
    take = Trainer.train_step

    def die(self):
        if self.state.rollbacks:
            raise KeyboardInterrupt
        return take(self)

    monkeypatch.setattr(Trainer, "train_step", die)
    with pytest.raises(KeyboardInterrupt):
        launch(ROLLING, *SERVERS)
    monkeypatch.setattr(Trainer, "train_step", take)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    assert resume() == Exit.DONE and resume(run_dir=tmp_path / "again") == Exit.DONE
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "again")
    assert same_end(tmp_path / "run", tmp_path / "again", 7)


def test_a_hung_engine_ends_with_its_time_limit(small, trained):
    """Closing an engine ends its waiting calls, so that nothing of a batch in flight outlives the run."""
    from fake_server import FakeServer

    from mgrpo.rollout.vllm.server import EnginePair, ServerEngine

    servers = [FakeServer() for _ in range(2)]

    def make(loaded, config):
        options = {"eos_ids": loaded.eos_ids, "pad_id": loaded.pad_id, "dtype": torch.float32, "max_length": 40}
        return EnginePair(*(ServerEngine(loaded.model, **options, url=server.url) for server in servers))

    config = small(OPTIONS | {"engine.servers": URLS, "steps": 9, "rollout.top_p": 0.9})
    trainer, _ = trained(config, 0, make_engine=make)
    try:
        source = trainer.source
        source.next(1)
        source.settle()
        for server in servers:
            server.hangs = True
        source.next(2)
        while not all(server.calls[-1] == "/v1/completions" for server in servers):
            time.sleep(0.01)
        trainer.close()
        with pytest.raises(EngineError, match="must answer /v1/completions"):
            source.next(3)
    finally:
        for server in servers:
            server.close()
