"""Answers that the model was sure of at the start: which are remembered, when they are asked for again."""

from __future__ import annotations

import json

import pytest

from mgrpo.config import MonitorConfig
from mgrpo.grading.checker import AnswerChecker
from mgrpo.observe.retention import MIN_ANSWERS, Retention
from mgrpo.rollout.transformers import TransformersEngine

ASKING = {"monitor.retention_every": 2, "monitor.retention_prompts": 44, "steps": 14}
EASY = {"data.train": "arithmetic:48:2:0", "rollout.max_new_tokens": 12, "rollout.num_prompts": 4}


def make(anchored: bool = False, **config) -> Retention:
    limits = MonitorConfig(**{"retention_every": 4, "retention_prompts": 7} | config)
    return Retention(limits, num_prompts=4, anchored=anchored)


def fill(retention: Retention, count: int = MIN_ANSWERS) -> None:
    retention.answers = {index: str(index) for index in range(count)}


def test_only_answers_that_are_greedy_and_elected_by_most_are_remembered():
    checker, retention = AnswerChecker(mode="exact"), make()
    batch, greedy = [5, 3, 8, 1], ["12", "12", None, "7"]
    retention.collect(batch, greedy, ["12", "13", "9", "7"], [0.6, 0.9, 0.9, 0.59], checker)
    assert retention.answers == {5: "12"}
    retention.collect([5, 3], ["4", "013"], ["4", "13"], [1.0, 1.0], checker)
    assert retention.answers == {5: "12", 3: "13"}
    retention.collect([9], [None], [None], [0.0], checker)
    assert 9 not in retention.answers


def test_prompts_are_asked_in_the_first_steps_and_then_now_and_again():
    retention, batch = make(), [7, 2]
    assert [retention.asks(step, batch) for step in (1, 2, 3)] == [batch, batch, []]  # 7 prompts are two batches of 4
    fill(retention)
    assert [step for step in range(3, 17) if retention.asks(step, batch)] == [4, 8, 12, 16]
    assert retention.asks(8, batch) == list(range(MIN_ANSWERS))


@pytest.mark.parametrize(("anchored", "drop"), [(False, 0.25), (True, 0.125)])
def test_answers_that_slip_are_asked_four_times_as_often(anchored, drop):
    retention, checker = make(anchored, retention_drop=drop), AnswerChecker(mode="exact")
    fill(retention)
    kept = [str(index) for index in range(MIN_ANSWERS)]
    assert retention.measure(dict(enumerate(kept)), checker) == 1.0
    assert [step for step in range(3, 13) if retention.asks(step, [])] == [4, 8, 12]
    assert retention.measure(dict(enumerate([None, "x", "", "99", *kept[4:]])), checker) == 1 - 4 / MIN_ANSWERS
    assert [step for step in range(3, 13) if retention.asks(step, [])] == [4, 8, 12]  # an eighth is the half of 0.25
    assert retention.measure(dict(enumerate([None] * 5 + kept[5:])), checker) < 0.875
    assert [step for step in range(3, 13) if retention.asks(step, [])] == [*range(3, 13)]


def test_what_slips_is_restored_with_the_answers():
    """A run that is resumed while answers slip goes on asking as often."""
    retention, checker = make(retention_drop=0.25), AnswerChecker(mode="exact")
    fill(retention)
    retention.measure(dict.fromkeys(range(MIN_ANSWERS)), checker)
    resumed = make(retention_drop=0.25)
    resumed.load_state_dict(json.loads(json.dumps(retention.state_dict())))
    assert [step for step in range(3, 8) if resumed.asks(step, [])] == [3, 4, 5, 6, 7]


def test_few_answers_say_nothing():
    retention = make()
    fill(retention, MIN_ANSWERS - 1)
    assert not any(retention.asks(step, [1]) for step in range(3, 20))


def test_zero_never_asks():
    retention = make(retention_every=0)
    fill(retention)
    assert not any(retention.asks(step, [1]) for step in range(1, 20))


def test_a_run_measures_what_its_policy_still_answers(small, trained):
    """On prompts that the model knows nothing is lost; a policy that has lost its mind shows at once."""
    trainer, rows = trained(small(EASY | ASKING), 12)
    assert len(trainer.retention.answers) >= MIN_ANSWERS
    assert [row["step"] for row in rows if row["retention"] is not None] == [12]
    assert rows[-1]["retention"] > 0.9 and rows[-1]["alarm"] is None
    answers = {prompt.index: prompt.answer for prompt in trainer.data.prompts}
    right = [answers[index] == answer for index, answer in trainer.retention.answers.items()]
    assert sum(right) >= 0.9 * len(right)
    for parameter in trainer.model.parameters():
        parameter.data.mul_(0.3)
    *_, last = trainer.train(14)
    assert last["retention"] < 0.3


def test_watching_changes_no_step(small, trained, weights_of):
    """The greedy answers draw no random number and touch no weight."""
    (watched, rows), (unwatched, others) = (
        trained(small(EASY | ASKING | {"monitor.retention_every": every}), 14) for every in (2, 0)
    )
    assert any(row["retention"] is not None for row in rows) and not any(row["retention"] for row in others)
    for row, other in zip(rows, others, strict=True):
        assert row | {"retention": None} == other
    other = weights_of(unwatched)
    assert all(tensor.equal(other[name]) for name, tensor in weights_of(watched).items())


@pytest.mark.parametrize("stop", [5, 12])
def test_resumed_in_either_phase_it_is_the_straight_run(launch, resume, tmp_path, rows_of, stop):
    options = EASY | ASKING | {"checkpoint.every": 0}
    assert launch(options, run_dir=tmp_path / "straight") == 0
    assert launch(options, "--stop-after", str(stop)) == 0
    assert resume("--stop-after", "14") == 0
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "straight")
    assert [row["retention"] is not None for row in rows_of(tmp_path / "run")].count(True) == 2


def test_the_policy_is_asked_with_the_weights_that_the_engine_holds(small, trained, monkeypatch):
    """No weights are published for the sake of watching."""
    loads, asked = [], []
    update, generate = TransformersEngine.update_weights, TransformersEngine.generate

    def see_update(engine, weights, tag):
        loads.append(tag.source)
        update(engine, weights, tag)

    def see_generate(engine, prompts, n, sampling, tag):
        asked.append((n, sampling.temperature, tag.source))
        return generate(engine, prompts, n, sampling, tag)

    monkeypatch.setattr(TransformersEngine, "update_weights", see_update)
    monkeypatch.setattr(TransformersEngine, "generate", see_generate)
    trained(small(EASY | ASKING), 2)
    assert loads == ["momentum", "policy"] * 2
    assert asked == [(2, 1.0, "momentum"), (4, 1.0, "policy"), (1, 0.0, "policy")] * 2
