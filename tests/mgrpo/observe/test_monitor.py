"""The collapse monitor: silence at the start, one plain reason for each signal."""

from __future__ import annotations

import pytest

from mgrpo.config import MonitorConfig
from mgrpo.observe.collapse import Monitor

CALM = {
    "top_answer": "07",
    "top_answer_share": 0.1,
    "unparseable_share": 0.05,
    "response_length": 30.0,
    "vote_agreement": 0.9,
}


def feed(rows: list[dict], *, num_prompts: int = 16, **config: float) -> tuple[list[list[str]], Monitor]:
    """Reasons of each row; steps count from 1."""
    limits = dict(agreement_drop=0.25, top_answer_share=0.3, unparseable_share=0.5, length_change=2.0, probe_drop=0.1)
    limits["retention_every"] = 0
    monitor = Monitor(MonitorConfig(window=4, **limits | config), num_prompts=num_prompts)
    return [monitor.observe({"step": step, **row}) for step, row in enumerate(rows, 1)], monitor


def test_chance_agreement_of_two_prompts_is_no_alarm():
    """With 4 prompts, two that share their answer make a share of 0.5."""
    rows = [CALM] * 6 + [CALM | {"top_answer_share": 0.45, "top_answer": "99"}] * 6
    assert feed(rows, num_prompts=4)[0][-1] == []
    assert feed(rows, num_prompts=16)[0][-1] == ["45% of the answers to different prompts are '99'"]


def test_silent_in_a_calm_run():
    reasons, monitor = feed([CALM] * 20)
    assert reasons == [[]] * 20
    assert monitor.good_before() == 20 - 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"top_answer_share": 0.53, "top_answer": "99"},
            "53% of the answers to different prompts are '99'",
        ),
        ({"unparseable_share": 0.75}, "75% of the responses have no answer"),
        ({"response_length": 61.0}, "responses went from 30 to 61 tokens"),
        ({"response_length": 14.0}, "responses went from 30 to 14 tokens"),
        (
            {"vote_agreement": 0.5},
            "the majorities of policy and momentum agree on 50% of the prompts, at their best on 90%",
        ),
    ],
)
def test_each_signal_names_its_reason(change, words):
    reasons, monitor = feed([CALM] * 10 + [CALM | change] * 4)
    assert reasons[:10] == [[]] * 10
    assert reasons[-1] == [words]
    first = next(step for step, row in enumerate(reasons, 1) if row)
    assert monitor.good_before() == first - 8


@pytest.mark.parametrize(
    "change",
    [
        {"top_answer_share": 0.3},
        {"unparseable_share": 0.5},
        {"response_length": 60.0},
        {"response_length": 15.0},
        {"vote_agreement": 0.66},
    ],
)
def test_at_its_threshold_a_signal_is_silent(change):
    assert not any(feed([CALM] * 6 + [CALM | change] * 8)[0])


def test_shares_that_were_high_from_the_start_must_double():
    start = CALM | {"top_answer_share": 0.4, "unparseable_share": 0.45}
    assert not any(feed([start] * 4 + [start | {"top_answer_share": 0.79, "unparseable_share": 0.89}] * 8)[0])
    reasons, _ = feed([start] * 4 + [start | {"top_answer_share": 0.81, "unparseable_share": 0.91}] * 8)
    assert len(reasons[-1]) == 2


def test_the_first_window_only_fills():
    """Whatever the first steps look like, they are what later ones are compared with."""
    reasons, _ = feed([CALM | {"response_length": length} for length in (300.0, 1.0, 1.0, 1.0)])
    assert reasons == [[]] * 4


def test_one_odd_step_is_averaged_away():
    odd = CALM | {"top_answer_share": 1.0}
    assert not any(feed([CALM] * 6 + [odd] + [CALM] * 6, top_answer_share=0.4)[0])
    assert any(feed([CALM] * 6 + [odd] * 2 + [CALM] * 6, top_answer_share=0.4)[0])


def test_chance_alone_is_no_loss_of_agreement():
    """Windows of 4 steps of 16 prompts, half of them guessed: a difference of 0.3 is within 6 standard errors."""
    rows = [CALM | {"vote_agreement": 0.6}] * 8 + [CALM | {"vote_agreement": 0.3}] * 8
    assert not any(feed(rows, num_prompts=16)[0])
    assert any(feed(rows, num_prompts=64)[0])


def test_a_falling_probe_alarms_against_its_best():
    rows = [CALM | {"probe_accuracy_policy": 0.5}] + [CALM] * 5
    rows += [CALM | {"probe_accuracy_policy": 0.6}, CALM, CALM | {"probe_accuracy_policy": 0.51}, CALM]
    rows += [CALM | {"probe_accuracy_policy": 0.49}]
    reasons, monitor = feed(rows)
    assert reasons[:-1] == [[]] * 10
    assert reasons[-1] == ["eval accuracy fell to 0.49 from 0.60"]
    assert monitor.good_before() == 11 - 8


@pytest.mark.parametrize(("agreement", "kept", "changed"), [(0.9, 0.761, 0.75), (None, 0.881, 0.87)])
def test_answers_that_change_alarm_at_once(agreement, kept, changed):
    """Retention is measured now and then, over a whole set of prompts: no window averages it."""
    calm = CALM | {"vote_agreement": agreement}
    rows = [calm] * 6 + [calm | {"retention": kept}, calm, calm | {"retention": changed}, calm]
    reasons, monitor = feed(rows, retention_every=20)
    alarm = f"{1 - changed:.0%} of the model's confident answers at the start have changed"
    assert reasons == [[]] * 8 + [[alarm], []]
    assert monitor.good_before() == 0


def test_no_momentum_rollouts_no_agreement_to_lose():
    alone = CALM | {"vote_agreement": None}
    assert not any(feed([alone] * 12)[0])
    assert not any(feed([CALM] * 6 + [alone] * 12)[0])
    unmeasured = {key: value for key, value in CALM.items() if key != "vote_agreement"}
    assert not any(feed([CALM] * 6 + [unmeasured] * 12)[0])


def test_good_before_remembers_the_first_alarm():
    odd = CALM | {"response_length": 100.0}
    reasons, monitor = feed([CALM] * 20 + [odd] * 4 + [CALM] * 10 + [odd] * 8)
    first = next(step for step, row in enumerate(reasons, 1) if row)
    assert first == 22
    assert not reasons[29]
    assert reasons[-1]
    assert monitor.good_before() == first - 8
