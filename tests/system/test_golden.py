from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

import mgrpo.algorithm.advantage
import mgrpo.algorithm.loss
import mgrpo.training.schedule

GOLDEN = Path(__file__).with_name("golden")
specification = importlib.util.spec_from_file_location("golden", GOLDEN / "make.py")
golden = importlib.util.module_from_spec(specification)
specification.loader.exec_module(golden)

# Of magnitude 1, or of the number where that is larger. A replay with AVX2 differs from AVX-512 by a tenth at most.
METRIC_TOLERANCE = {"grad_norm": 1e-5, "loss": 2e-7}
OTHER_TOLERANCE = 1e-6
# Of the length of the way that a tensor went.
WEIGHT_TOLERANCE = 3e-4


def differences(expected, actual):
    """Every number that is not what was recorded."""
    found = []
    for old, new in zip(expected["rows"], actual["rows"], strict=True):
        for key, value in old.items():
            same = new[key] == value
            if isinstance(value, float) and isinstance(new[key], float):
                same = abs(new[key] - value) <= METRIC_TOLERANCE.get(key, OTHER_TOLERANCE) * max(1.0, abs(value))
            if not same:
                found.append(f"{key}: {value} -> {new[key]}")
    assert expected["moved"].keys() == actual["moved"].keys()
    for name, (length, projection) in expected["moved"].items():
        for old, new in zip((length, projection), actual["moved"][name], strict=True):
            if not abs(new - old) <= WEIGHT_TOLERANCE * length:
                found.append(f"{name}: {old} -> {new}")
    return found


@pytest.fixture(scope="module")
def expected():
    content = json.loads((GOLDEN / "metrics.json").read_text())
    assert content["base"] == golden.base_digest(), (
        "the shipped model is another one: python tests/system/golden/make.py"
    )
    return content


# What was recorded is the reference's; the compiled kernels round otherwise, by a tenth of what is tolerated.
@pytest.mark.parametrize("backend", ["reference", "cpu", "auto"])
def test_a_replay_gives_the_recorded_numbers(expected, monkeypatch, backend):
    config = golden.make_config(backend)
    monkeypatch.setattr(golden, "make_config", lambda: config)
    assert differences(expected, golden.replay()) == []


def scaled(function, factor):
    return lambda *args, **options: function(*args, **options) * factor


# Small mistakes in what a step computes.
MISTAKES = {
    "advantage of the other sign": (
        "mgrpo.algorithm.credit.group_advantage",
        scaled(mgrpo.algorithm.advantage.group_advantage, -1),
    ),
    "advantage scaled": (
        "mgrpo.algorithm.credit.group_advantage",
        scaled(mgrpo.algorithm.advantage.group_advantage, 0.999),
    ),
    "loss scaled": ("mgrpo.training.learner.normalizer", scaled(mgrpo.algorithm.loss.normalizer, 1.001)),
    "learning rate scaled": (
        "mgrpo.training.learner.learning_rate",
        scaled(mgrpo.training.schedule.learning_rate, 0.999),
    ),
    "decay": ("mgrpo.models.momentum.decay_at", lambda *_: 0.901),
    "one average missing": ("mgrpo.models.momentum.decay_at", lambda _, step, __: 1.0 if step == 9 else 0.9),
    "temperature": {"rollout.temperature": 1.201},
    "kl": {"objective.kl_coef": 0.0505},
    "kl reference": {"objective.kl_reference": "initial"},
    "lower clip": {"objective.clip_low": 0.006},
    "upper clip": {"objective.clip_high": 0.011},
    "quartiles of the batch": {"filter.scope": "batch"},
    "factor of the filter": {"filter.k": 0.5},
    "filter for the loss alone": {"filter.applies_to": "loss"},
    "votes of the policy": {"vote.pool": "policy"},
    "weight of momentum votes": {"vote.momentum_weight": 3},
    "advantage over all": {"objective.advantage_over": "all"},
    "truncated rollouts": {"rollout.truncated": "mask"},
    "minibatches": {"optim.num_minibatches": 1},
    "gradient clip": {"optim.grad_clip": 0.2},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_replay_with_a_mistake_differs(expected, monkeypatch, altered, mistake):
    change = MISTAKES[mistake]
    if isinstance(change, tuple):
        monkeypatch.setattr(*change)
    else:
        config = altered(golden.make_config(), change)
        monkeypatch.setattr(golden, "make_config", lambda: config)
    assert differences(expected, golden.replay())
