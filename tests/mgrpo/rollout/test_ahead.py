"""Rollouts of the next step are sampled while this one trains, one version old, and nothing else differs."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from twin_engine import AHEAD, URLS, TwinEngine

from mgrpo.data.sampler import Sampler
from mgrpo.errors import ConfigError, EngineError, StaleWeightsError
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.training.learner import Learner
from mgrpo.types import WeightTag

PAIR = {key: value for key, value in AHEAD.items() if key != "rollout.ahead"} | {"engine.servers": URLS}
OPTIONS = AHEAD | PAIR | {"optim.lr": 1e-3, "momentum.decay": 0.8, "steps": 4, "rollout.parity_every": 2}


@pytest.fixture
def run(small, trained):
    """Trains `steps` steps of OPTIONS and others; returns trainer, rows and batches."""

    def start(changes=None, steps=4, make_engine=lambda loaded, config: TwinEngine(loaded)):
        trainer, _ = trained(small(OPTIONS | (changes or {})), 0, make_engine=make_engine)
        results = [trainer.train_step() for _ in range(steps)]
        return trainer, [result.metrics for result in results], [result.batch for result in results]

    return start


def test_a_batch_is_one_version_old_and_the_engine_idle_when_weights_arrive(run):
    trainer, rows, batches = run()
    assert [row["rollout_age"] for row in rows] == [0, 1, 1, 1]
    assert [batch.trajectories.version for batch in batches] == [0, 0, 1, 2]
    assert [tag.version for kind, tag in trainer.engine.events if kind == "update"] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert trainer.sampler.state_dict()["num_batches"] == 4, "after the last step nothing is started"


def test_the_step_trains_while_the_next_batch_is_generated(run, monkeypatch):
    """Neither ends without the other: the engine waits for the update of step 1, which waits for the engine."""
    generating, updated, learn = threading.Event(), threading.Event(), Learner.learn

    class Waiting(TwinEngine):
        def generate(self, prompts, n, sampling, tag):
            if len(prompts) > 1 and sum(kind == "start" for kind, _ in self.events) >= 6:  # two checks, one batch
                generating.set()
                assert updated.wait(60)
            return super().generate(prompts, n, sampling, tag)

    def watched(self, *args):
        assert generating.wait(60)
        found = learn(self, *args)
        updated.set()
        return found

    monkeypatch.setattr(Learner, "learn", watched)
    _, rows, _ = run({"steps": 2}, steps=2, make_engine=lambda loaded, config: Waiting(loaded))
    assert [row["rollout_age"] for row in rows] == [0, 1]


def test_tokens_belong_to_their_step_whenever_they_are_sampled(run):
    """Without learning both ways give the same numbers."""
    still = {"optim.lr": 0.0, "rollout.parity_every": 0}
    _, ahead, batches = run(still)
    _, now, expected = run(still | {"rollout.ahead": 0})
    for found, other in zip(batches, expected, strict=True):
        assert torch.equal(found.trajectories.tokens, other.trajectories.tokens)
    unlike = {"parity_policy", "parity_momentum", "rollout_age", "step_s", "tokens_per_s"}
    kept = [{k: v for k, v in row.items() if k not in unlike and not k.startswith("time_")} for row in (*ahead, *now)]
    assert kept[:4] == kept[4:]


def test_log_probs_of_the_engine_are_those_of_the_weights_that_generated(run):
    """And differ from the trainer's by the step between, which the truncated importance weight corrects."""
    trainer, rows, batches = run()
    assert [row["parity_policy"] is not None for row in rows] == [True, True, True, True]
    assert max(row[f"parity_{source}"] for row in rows for source in ("policy", "momentum")) < 1e-5
    assert rows[0]["logprob_gap"] < 1e-5 < 1e-4 < min(row["logprob_gap"] for row in rows[1:])
    assert rows[0]["tis_mean"] == pytest.approx(1, abs=1e-5) and abs(rows[2]["tis_mean"] - 1) > 1e-5
    last = batches[-1].trajectories
    old = trainer.passes.logprobs(last).logprob
    assert not torch.allclose(old[last.by_policy], last.rollout_logprob[last.by_policy], atol=1e-4)


@pytest.mark.parametrize("liar", ["policy", "momentum"])
def test_an_engine_that_keeps_its_first_weights_is_found(run, liar):
    class Stale(TwinEngine):
        def update_weights(self, weights, tag):
            if tag.source != liar or tag.version == 0:
                super().update_weights(weights, tag)
            self.engines[tag.source].held = tag

    with pytest.raises(StaleWeightsError, match=f"did not use the weights of {liar} version 1"):
        run({"rollout.parity_every": 0}, make_engine=lambda loaded, config: Stale(loaded))


def test_an_engine_with_wrong_log_probs_is_found_before_the_first_step(run):
    class Lying(TwinEngine):
        def generate(self, prompts, n, sampling, tag):
            found = super().generate(prompts, n, sampling, tag)
            return replace(found, logprobs=found.logprobs - 0.01)

    with pytest.raises(StaleWeightsError, match="did not use the weights of policy version 0"):
        run(steps=1, make_engine=lambda loaded, config: Lying(loaded))


def test_an_evaluation_waits_for_the_batch_in_flight(run):
    """TwinEngine refuses weights that arrive while it generates."""
    options = {"eval.every": 1, "eval.samples": 1, "data.probe": "arithmetic:4:2:9"}
    _, rows, _ = run(options, make_engine=lambda loaded, config: TwinEngine(loaded, delay_s=0.1))
    assert all(row["probe_accuracy_policy"] is not None for row in rows)


def test_answers_are_remembered_and_measured_one_version_late(run):
    """The first 8 steps ask for the answers to their prompts, the eighth measures what was there before the seventh."""
    options = {
        "steps": 12,
        "data.train": "arithmetic:48:2:0",
        "rollout.max_new_tokens": 12,
        "monitor.retention_every": 1,
        "monitor.retention_prompts": 44,
        "optim.lr": 0.0,
    }
    trainer, rows, batches = run(options, steps=12)
    assert all([p.index for p in batch.asked] == [p.index for p in batch.prompts] for batch in batches[:11])
    assert rows[10]["retention"] is None and len(trainer.retention.answers) >= 32
    # Step 12 was asked for before step 11 was remembered.
    assert 32 <= len(batches[11].asked) <= len(trainer.retention.answers)
    assert rows[11]["retention"] == 1.0


class Flaky(TwinEngine):
    """Ends in one of its generations of a whole batch, by version and source."""

    dies_at = WeightTag("policy", 1)

    def generate(self, prompts, n, sampling, tag):
        if tag == self.dies_at and len(prompts) > 1:
            raise EngineError("generate: it is gone.")
        return super().generate(prompts, n, sampling, tag)


def test_a_failure_in_the_background_comes_with_the_next_step_whose_prompts_are_drawn_again(run, small, tmp_path):
    trainer, rows, _ = run(steps=2, make_engine=lambda loaded, config: Flaky(loaded))
    assert [row["rollout_age"] for row in rows] == [0, 1]
    trainer.save(tmp_path)  # moves the sampler back, because the batch is not saved
    assert trainer.sampler.state_dict()["num_batches"] == 2 and not (tmp_path / "rollouts.safetensors").exists()
    with pytest.raises(EngineError, match="it is gone"):
        trainer.train_step()
    assert trainer.step == 2 and trainer.sampler.state_dict()["num_batches"] == 2
    sampler = Sampler(len(trainer.data), 4, trainer.config.seed)
    third = [sampler.next() for _ in range(3)][2]
    result = trainer.train_step()  # by the weights of now
    assert [prompt.index for prompt in result.batch.prompts] == third and result.metrics["rollout_age"] == 0


@pytest.mark.parametrize("fails", ["publish", "later"])
def test_a_step_that_fails_after_its_batch_is_there_gets_the_same_batch_again(run, monkeypatch, fails):
    """Whether the next batch can not be started, or something else ends the step."""
    _, expected, _ = run({"rollout.parity_every": 0})
    trainer, rows, _ = run({"rollout.parity_every": 0}, steps=1)
    owner, name = (trainer.generator, "publish") if fails == "publish" else (trainer.grader, "assign_credit")
    real = getattr(owner, name)

    def fail(*args):
        raise EngineError("it is gone.")

    setattr(owner, name, fail)
    with pytest.raises(EngineError, match="it is gone"):
        trainer.train_step()
    assert trainer.step == 1 and trainer.sampler.state_dict()["num_batches"] == 2
    setattr(owner, name, real)
    rows += [trainer.train_step().metrics for _ in range(3)]
    for key in ("loss", "reward_mean", "logprob_gap", "rollout_age", "top_answer"):
        assert [row[key] for row in rows] == [row[key] for row in expected], key


def test_closing_waits_for_no_more_than_the_engine(run):
    trainer, _, _ = run(steps=1, make_engine=lambda loaded, config: TwinEngine(loaded, delay_s=0.3))
    trainer.close()
    assert trainer.engine.at_work == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollouts")]


class Shared(TransformersEngine):
    num_weight_slots = 2


class Single(TwinEngine):
    num_weight_slots = 1


@pytest.mark.parametrize("engine", ["shared", "single"])
def test_an_engine_that_cannot_hold_older_weights_of_both_models_is_refused(small, trained, engine):
    options = {"eos_ids": (1,), "pad_id": 0, "dtype": torch.float32, "batch_size": 8}
    make = {"shared": lambda loaded, _: Shared(loaded.model, **options), "single": lambda loaded, _: Single(loaded)}
    with pytest.raises(ConfigError, match="needs an engine with own weights of both models"):
        trained(small(OPTIONS), 0, make_engine=make[engine])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine.name": "transformers", "engine.placement": "one-engine"}, "placement two-engines or server, got one"),
        ({"engine.placement": "one-engine"}, "--engine.placement two-engines or server, got one-engine"),
        ({"engine.servers": URLS[:1]}, "two --engine.servers, or --rollout.num-momentum 0"),
        ({"engine.sleep": True}, "--engine.no-sleep"),
        ({"optim.num_minibatches": 2}, "one optimiser step a batch, .*, got 2"),
        ({"optim.num_epochs": 3}, "one optimiser step a batch, .*, got 3"),
    ],
)
def test_options_that_do_not_go_with_it_are_refused_by_name(small, changes, message):
    servers = {} if changes.get("engine.placement") != "one-engine" else {"engine.servers": ()}
    with pytest.raises(ConfigError, match=f"config: --rollout.ahead 1 needs .*{message}"):
        small(OPTIONS | servers | changes)
    small(OPTIONS | servers | changes | {"rollout.ahead": 0})


def test_it_needs_one_process(small):
    with pytest.raises(ConfigError, match=r"config: --rollout\.ahead needs one process, got 2"):
        small(OPTIONS | {"distributed.processes": 2})


def test_one_server_is_enough_without_a_momentum_model(small):
    alone = {"rollout.num_momentum": 0, "vote.pool": "policy", "objective.momentum_in_loss": False}
    small(OPTIONS | alone | {"engine.servers": URLS[:1]})
