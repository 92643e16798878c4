"""Metrics of one hand-made outcome, timers and trackers."""

from __future__ import annotations

import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from mgrpo.algorithm.evidence import Evidence
from mgrpo.algorithm.vote import vote
from mgrpo.config import Config, LogConfig, VoteConfig
from mgrpo.errors import ConfigError, InputError
from mgrpo.observe.catalogue import FIGURES, METRICS, PANELS, keys_of, require_known
from mgrpo.observe.step import Outcome, mean, outcome_metrics, top_answer, weighted
from mgrpo.observe.timer import Timer
from mgrpo.observe.trackers import JsonlTracker, make_trackers, read_metrics
from mgrpo.rollout.transformers import TransformersEngine

IDS = torch.tensor([[1, 1, 2, 1], [0, 4, 4, 0], [-1, -1, -1, 5]])
ANSWERS = [["a", "a", "b", "a"], ["c", "a", "a", "c"], [None, None, None, "e"]]
LENGTHS = torch.tensor([[2, 4, 6, 8], [1, 1, 1, 1], [10, 2, 2, 2]])
KEEP = torch.tensor([[True, True, False, True], [True] * 4, [True] * 4])


def outcome(num_policy: int = 3, label_correct: list[bool] | None = None) -> Outcome:
    elected = vote(Evidence(answer_ids=IDS, num_policy=num_policy), KEEP, VoteConfig())
    advantage = torch.zeros(3, 4)
    advantage[0, 0] = 1.0
    return Outcome(
        answers=ANSWERS,
        answer_ids=IDS,
        labels=["a", "c", "e"],
        lengths=LENGTHS,
        truncated=LENGTHS == 10,
        entropy=torch.arange(12.0).view(3, 4),
        keep=KEEP,
        trains=KEEP,
        vote=elected,
        rewards=torch.tensor([[1.0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 1]]),
        advantage=advantage,
        num_policy=num_policy,
        label_correct=[True, False] if label_correct is None else label_correct,
    )


def test_outcome_metrics():
    metrics = outcome_metrics(outcome())
    entropy = (torch.arange(12.0).view(3, 4) * LENGTHS).sum() / LENGTHS.sum()
    expected = {
        "reward_mean": 3 / 9,
        "reward_mean_momentum": 1.0,
        "majority_share": (1 + 1 / 2 + 1 / 4) / 3,
        # Alone, the policy elects 1, 4 and nothing; momentum 1, 0 and 5.
        "vote_agreement": 1 / 2,
        "tie_share": 1 / 3,
        "no_signal_share": 0.0,
        "zero_signal_share": 2 / 3,
        "distinct_answers": (2 + 2 + 1) / 3,
        "response_length": 40 / 12,
        "response_length_policy": 29 / 9,
        "response_length_momentum": 11 / 3,
        "truncated_share": 1 / 12,
        "pruned_share": 1 / 12,
        "pruned_length": 6.0,
        "kept_length": 34 / 11,
        "vote_accuracy": 0.5,
        "unparseable_share": 3 / 12,
        "unparseable_share_policy": 3 / 9,
        "unparseable_share_momentum": 0.0,
        "top_answer_share": 5 / 12,
        "top_answer_share_policy": 4 / 9,
        "top_answer_share_momentum": 1 / 3,
        "token_entropy": float(entropy),
        "token_entropy_momentum": (3 * 8 + 7 * 1 + 11 * 2) / 11,
    }
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert metrics["top_answer"] == "a"
    assert metrics["token_entropy_policy"] == pytest.approx(
        ((torch.arange(12.0).view(3, 4) * LENGTHS)[:, :3].sum() / 29).item()
    )


def test_without_momentum_rollouts_there_is_no_agreement():
    metrics = outcome_metrics(outcome(num_policy=4))
    assert metrics["vote_agreement"] is None
    assert not any(key.endswith("_momentum") for key in metrics)
    assert metrics["reward_mean"] == pytest.approx(6 / 12)


def test_without_labels_there_is_no_accuracy():
    assert outcome_metrics(outcome(label_correct=[]))["vote_accuracy"] is None


def test_top_answer_is_the_commonest_over_all_rollouts():
    assert top_answer(ANSWERS) == ("a", 5 / 12)
    assert top_answer(ANSWERS, slice(3, None)) == ("a", 1 / 3)
    assert top_answer([[None], [None]]) == (None, 0.0)


def test_mean_and_weighted_mean():
    assert mean([]) == 0.0
    assert mean(torch.tensor([True, False, False, False])) == 0.25
    assert mean([1, 2]) == 1.5
    assert weighted(torch.tensor([1.0, 5.0]), torch.tensor([3, 1])).item() == 2.0
    assert weighted(torch.tensor([1.0, 5.0]), torch.tensor([0, 0])).item() == 0.0


def test_timer_adds_up_phases_and_survives_exceptions():
    timer = Timer()
    for _ in range(2):
        with timer("a"):
            time.sleep(0.01)
    with pytest.raises(KeyError), timer("b"):
        raise KeyError
    metrics = timer.metrics()
    assert metrics.keys() == {"step_s", "time_a_s", "time_b_s"}
    assert metrics["time_a_s"] >= 0.02


def test_jsonl_is_read_back_as_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    for step in (1, 2, 3):
        tracker.log({"step": step, "loss": math.nan if step == 2 else 0.5, "big": math.inf, "alarm": ["why"]})
    rows = read_metrics(path)  # flushed, though not closed
    tracker.close()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == [0.5, None, 0.5]
    assert rows[0]["big"] is None
    assert rows[0]["alarm"] == ["why"]
    assert [row["step"] for row in read_metrics(path, up_to=2)] == [1, 2]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_cut_last_line_is_left_out_and_a_cut_middle_is_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not valid JSON"):
        read_metrics(path)


def test_a_missing_tracker_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"trackio is not\. pip install trackio"):
        make_trackers(Config(log=LogConfig(backends=("trackio",))), tmp_path, 0)


def test_module_tracker_sends_numbers_alone(tmp_path, monkeypatch):
    calls = []
    fake = SimpleNamespace(
        init=lambda **options: calls.append(("init", options["name"], options["config"]["seed"])),
        log=lambda numbers, step: calls.append(("log", numbers, step)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    jsonl, tracker = make_trackers(Config(log=LogConfig(backends=("trackio",)), seed=7), tmp_path, 0)
    tracker.log({"step": 4, "loss": 0.5, "top_answer": "99", "kl": None})
    for one in (jsonl, tracker):
        one.close()
    assert calls == [("init", tmp_path.name, 7), ("log", {"step": 4, "loss": 0.5}, 4), ("finish",)]


def test_a_metric_that_is_in_no_row_of_the_catalogue_fails_where_it_is_logged(launch, monkeypatch):
    require_known(["step", "time_ema_s", "probe_pass_momentum"])
    monkeypatch.setattr(TransformersEngine, "stats", lambda self: {"speed": 1.0})
    with pytest.raises(KeyError, match=r"rows of METRICS in observe/catalogue.py, got speed\."):
        launch()


def test_every_panel_shows_metrics_of_the_catalogue():
    assert all(keys_of(panel) for panel in PANELS) and {panel.figure for panel in PANELS.values()} == FIGURES.keys()
    assert {name for metric in METRICS.values() for name in metric.panels} == PANELS.keys()
