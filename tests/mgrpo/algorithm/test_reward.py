"""Rewards of every kind on one hand-made vote."""

from __future__ import annotations

import typing

import pytest
import torch

from mgrpo.algorithm.evidence import Evidence
from mgrpo.algorithm.reward import REWARDS
from mgrpo.algorithm.vote import vote
from mgrpo.config import ObjectiveConfig, VoteConfig

# The last prompt has no parsed answer; the third falls short of a minimum share of 0.5.
IDS = torch.tensor([[4, 4, 6, -1], [6, 6, 6, 6], [1, 2, 3, 1], [-1, -1, -1, -1]])
ENTROPY = torch.arange(16.0).view(4, 4)
CERTAINTY = ENTROPY.flip(1) + 0.5
CORRECT = torch.tensor([[False, False, True, False], [True] * 4, [False, True, False, False], [False] * 4])
MAJORITY = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]]
SOFT = [[0.5, 0.5, 0.25, 0], [1, 1, 1, 1], [0.5, 0.25, 0.25, 0.5], [0, 0, 0, 0]]


def rewards(kind: str, *, correct: torch.Tensor = CORRECT, **config: float) -> torch.Tensor:
    evidence = Evidence(answer_ids=IDS, num_policy=3, entropy=ENTROPY, self_certainty=CERTAINTY, correct=correct)
    elected = vote(evidence, torch.ones_like(IDS, dtype=torch.bool), VoteConfig(**config))
    return REWARDS[kind].compute(elected, evidence)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("majority", torch.tensor(MAJORITY).float()),
        ("soft", torch.tensor(SOFT)),
        ("labels", CORRECT.float()),
        ("self-certainty", CERTAINTY),
        ("entropy", -ENTROPY),
    ],
)
def test_kinds(kind, expected):
    assert torch.equal(rewards(kind), expected)


@pytest.mark.parametrize(("kind", "table"), [("majority", MAJORITY), ("soft", SOFT)])
def test_a_prompt_without_signal_gets_zeros(kind, table):
    got = rewards(kind, min_share=0.6)
    assert got[[0, 2, 3]].eq(0).all()
    assert got[1].tolist() == table[1]


@pytest.mark.parametrize("kind", ["majority", "soft", "labels"])
def test_an_unparseable_rollout_is_never_rewarded(kind):
    assert rewards(kind)[IDS < 0].eq(0).all()


@pytest.mark.parametrize("kind", ["majority", "soft", "self-certainty", "entropy"])
def test_true_answers_reach_no_label_free_reward(kind):
    assert torch.equal(rewards(kind, correct=~CORRECT), rewards(kind))
    assert not torch.equal(rewards("labels", correct=~CORRECT), rewards("labels"))


def test_a_dropped_rollout_of_the_elected_class_still_matches():
    keep = torch.ones_like(IDS, dtype=torch.bool)
    keep[0, 1] = False
    keep[0, 2] = False
    evidence = Evidence(answer_ids=IDS, num_policy=3, entropy=ENTROPY)
    elected = vote(evidence, keep, VoteConfig())
    assert REWARDS["majority"].compute(elected, evidence)[0].tolist() == [1, 1, 0, 0]
    assert REWARDS["soft"].compute(elected, evidence)[0].tolist() == [0.5, 0.5, 0, 0]


def test_every_reward_is_an_option_and_every_option_a_reward():
    assert typing.get_args(typing.get_type_hints(ObjectiveConfig)["reward"]) == tuple(REWARDS)
