"""The trainer's own hooks, with stand-ins where Ray would be; test_verl_training has the whole."""

from __future__ import annotations

import logging
import types

import pytest
import torch

from mgrpo.config import from_dict
from mgrpo.integrations.verl import trainer as verl_trainer
from mgrpo.integrations.verl.trainer import MGRPOTrainer
from mgrpo.observe.collapse import Monitor


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What the trainer asks of others, in order."""
    calls: list[str] = []
    monkeypatch.setattr(verl_trainer.ray, "get", lambda value: calls.append("wait") or value)
    return calls


@pytest.fixture
def make_trainer(calls):
    """A trainer whose workers, engine and queue write down that they were called."""

    def make(**config) -> MGRPOTrainer:
        def say(name, value=None):
            return lambda *_, **__: calls.append(name) or value

        trainer = object.__new__(MGRPOTrainer)
        trainer.recipe = from_dict({"rollout": {"num_policy": 4, "num_momentum": 2, "num_prompts": 8}, **config})
        trainer.checkpoint_manager = types.SimpleNamespace(sleep_replicas=say("sleep"), update_weights=say("policy in"))
        trainer.actor_rollout_wg = types.SimpleNamespace(update_momentum_weights=say("momentum in"))
        trainer.roll_out_momentum = say("momentum rolls out", "rollouts")
        trainer._save_checkpoint = say("save")
        trainer.monitor = Monitor(trainer.recipe.monitor, num_prompts=8)
        trainer.timing_raw, trainer.global_steps, trainer.total_training_steps = {}, 7, 100
        trainer.curr_step_profile, trainer._stop, trainer._prompts = False, False, ["prompts"]
        trainer._momentum_batch = None
        return trainer

    return make


def test_the_engine_sleeps_whenever_its_weights_change(make_trainer, calls):
    trainer = make_trainer()
    trainer.on_sample_end()
    assert calls == ["sleep", "momentum in", "wait", "momentum rolls out", "sleep"]
    assert trainer._momentum_batch == "rollouts" and trainer._prompts == []
    assert trainer.timing_raw["gen_momentum"] >= 0


def test_without_momentum_rollouts_a_step_is_verls(make_trainer, calls):
    trainer = make_trainer(rollout={"num_policy": 4, "num_momentum": 0, "num_prompts": 8})
    trainer.on_sample_end()
    assert calls == ["sleep"] and trainer._momentum_batch is None


def test_verl_takes_the_mode_for_the_synchronous_one(make_trainer):
    trainer = make_trainer()
    trainer.trainer_mode = "mgrpo"
    assert trainer.trainer_mode == "sync"


def observe(trainer, share: float, steps: int) -> dict[str, float]:
    metrics: dict[str, float] = {}
    row = {"top_answer_share": share, "unparseable_share": 0.0, "response_length": 9.0, "vote_agreement": None}
    for _ in range(steps):
        metrics = {}
        trainer._observe(types.SimpleNamespace(metrics=dict(row)), metrics)
    return metrics


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_an_alarm_is_told_and_stops_the_run_where_it_should(make_trainer, calls, action, caplog):
    trainer = make_trainer(monitor={"on_collapse": action, "window": 2})
    assert observe(trainer, 0.3, 4)["mgrpo/alarms"] == 0
    trainer.on_step_end()
    assert calls == ["policy in"] and trainer.total_training_steps == 100
    with caplog.at_level(logging.WARNING):
        assert observe(trainer, 0.95, 2)["mgrpo/alarms"] >= 1
    assert "step 7" in caplog.text and "%" in caplog.text
    trainer.on_step_end()
    assert calls == ["policy in", "policy in", *(["save"] if action == "stop" else [])]
    assert trainer.total_training_steps == (7 if action == "stop" else 100)


def test_only_numbers_are_logged(make_trainer):
    metrics: dict[str, float] = {}
    row = {"top_answer_share": 0.1, "unparseable_share": 0.0, "response_length": 9.0, "top_answer": "12", "x": None}
    make_trainer()._observe(types.SimpleNamespace(metrics=row), metrics)
    assert set(metrics) == {
        f"mgrpo/{n}" for n in ("top_answer_share", "unparseable_share", "response_length", "alarms")
    }
    assert (
        all(isinstance(value, float) for value in metrics.values())
        and torch.tensor(list(metrics.values())).isfinite().all()
    )
