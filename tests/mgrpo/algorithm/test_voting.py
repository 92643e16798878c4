"""IQR filter and majority vote, against hand-made cases and a plain count."""

from __future__ import annotations

import random
import typing
from functools import partial

import pytest
import torch

import mgrpo_kernels as K
from mgrpo.algorithm.credit import assign_credit, needed_evidence
from mgrpo.algorithm.evidence import Evidence
from mgrpo.algorithm.filter import filter_trajectories
from mgrpo.algorithm.vote import VOTE_RULES, VoteRule, first_of_class, vote
from mgrpo.config import FilterConfig, ObjectiveConfig, VoteConfig
from mgrpo.grading.checker import AnswerChecker


def elect(ids: list[int], num_policy: int, *, dropped: tuple[int, ...] = (), **config: object):
    """Vote of one prompt."""
    keep = torch.tensor([[i not in dropped for i in range(len(ids))]])
    return vote_on(torch.tensor([ids]), keep, num_policy, VoteConfig(**config))


def vote_on(ids: torch.Tensor, keep: torch.Tensor, num_policy: int, config: VoteConfig):
    return vote(Evidence(answer_ids=ids, num_policy=num_policy), keep, config)


@pytest.mark.parametrize(
    ("ids", "num_policy", "dropped", "label", "tie"),
    [
        ([5, 5, 7, 7], 3, (), 7, True),
        ([5, 7, 7, 5], 2, (), 5, True),
        ([7, 5, 5, 7], 4, (), 7, True),
        ([5, 7, 5, 7], 4, (), 5, True),
        ([9, 5, 5, 9, 9], 5, (0,), 5, True),
        ([5, 5, 7, 7, 5], 3, (4,), 7, True),
        ([5, 5, 5, 7, 7], 3, (), 5, False),
        ([-1, -1, -1, 7, 5], 4, (), 5, True),
    ],
    ids=[
        "momentum decides against the earliest",
        "equal momentum votes fall to the earliest",
        "earliest, not smallest id",
        "earliest, not largest id",
        "a dropped rollout is not the earliest",
        "a dropped momentum vote does not decide",
        "no tie, momentum decides nothing",
        "unparsed rollouts elect nobody",
    ],
)
def test_ties(ids, num_policy, dropped, label, tie):
    elected = elect(ids, num_policy, dropped=dropped)
    assert elected.label.tolist() == [label]
    assert elected.tie.tolist() == [tie]


@pytest.mark.parametrize(
    ("config", "label", "share"),
    [
        ({"pool": "both"}, 1, 3 / 5),
        ({"pool": "policy"}, 1, 1.0),
        ({"pool": "momentum"}, 2, 1.0),
        ({"momentum_weight": 2}, 2, 4 / 7),
        ({"pool": "momentum", "momentum_weight": 3}, 2, 1.0),
    ],
)
def test_pool_and_momentum_weight(config, label, share):
    elected = elect([1, 1, 1, 2, 2], 3, **config)
    assert elected.label.tolist() == [label]
    assert elected.share.item() == pytest.approx(share, rel=1e-6)


def test_share_is_over_survivors_parsed_or_not():
    assert elect([1, 1, -1, -1], 4).share.item() == 0.5
    assert elect([1, 1, -1, -1], 4, dropped=(3,)).share.item() == pytest.approx(2 / 3)
    assert elect([1, 1, 2, -1], 4, dropped=(2,)).class_share.tolist()[0] == pytest.approx([2 / 3, 2 / 3, 0, 0])


@pytest.mark.parametrize(
    ("config", "signal"),
    [
        ({}, True),
        ({"min_share": 0.5}, True),
        ({"min_share": 0.51}, False),
        ({"min_margin": 0.25}, True),
        ({"min_margin": 0.26}, False),
        ({"min_share": 0.5, "min_margin": 0.26}, False),
    ],
)
def test_thresholds_include_their_value(config, signal):
    assert elect([1, 1, 2, -1], 4, **config).signal.tolist() == [signal]


def test_without_votes_there_is_no_label_and_no_signal():
    for elected in (elect([-1, -1], 1), elect([3, 3], 1, dropped=(0, 1)), elect([3, -1], 1, pool="momentum")):
        assert elected.label.tolist() == [-1]
        assert elected.signal.tolist() == [False]
        assert elected.share.tolist() == [0]


def test_agreement_compares_what_each_source_elects_alone():
    ids = torch.tensor([[1, 1, 2, 1], [1, 1, 2, 2], [1, 1, -1, -1], [-1, -1, -1, -1]])
    elected = vote_on(ids, torch.ones_like(ids, dtype=torch.bool), 2, VoteConfig(pool="momentum"))
    assert elected.agreement_known.tolist() == [True, True, False, False]
    # The first prompt's momentum tie falls to its earliest, 2.
    assert elected.agreement.tolist() == [False, False, False, False]
    agreeing = vote_on(ids.flip(1), torch.ones_like(ids, dtype=torch.bool), 2, VoteConfig())
    assert agreeing.agreement.tolist() == [True, False, False, False]
    dropped = torch.tensor([[True, True, False, True]] * 4)
    assert vote_on(ids, dropped, 2, VoteConfig()).agreement.tolist()[0]


def count(ids, keep, num_policy, config):
    """The vote of one prompt by plain counting: label, share, margin, tie."""
    votes, by_momentum, earliest, total = {}, {}, {}, 0
    for i, (answer, kept) in enumerate(zip(ids, keep, strict=True)):
        momentum = i >= num_policy
        if not kept or config.pool not in ("both", "momentum" if momentum else "policy"):
            continue
        weight = config.momentum_weight if momentum else 1
        total += weight
        if answer >= 0:
            votes[answer] = votes.get(answer, 0) + weight
            by_momentum[answer] = by_momentum.get(answer, 0) + momentum * weight
            earliest.setdefault(answer, i)
    if not votes:
        return -1, 0.0, 0.0, False
    ranked = sorted(votes, key=lambda a: (-votes[a], -by_momentum[a], earliest[a]))
    second = votes[ranked[1]] if len(ranked) > 1 else 0
    return ranked[0], votes[ranked[0]] / total, (votes[ranked[0]] - second) / total, votes[ranked[0]] == second


@pytest.mark.parametrize("pool", ["both", "policy", "momentum"])
@pytest.mark.parametrize("weight", [1, 3])
def test_vote_equals_a_plain_count(pool, weight):
    rng = random.Random(weight)
    config = VoteConfig(pool=pool, momentum_weight=weight, min_share=0.4, min_margin=0.2)
    ids = [[rng.randrange(-1, 4) for _ in range(7)] for _ in range(200)]
    keep = [[rng.random() < 0.8 for _ in range(7)] for _ in range(200)]
    elected = vote_on(torch.tensor(ids), torch.tensor(keep), 4, config)
    for b in range(200):
        label, share, margin, tie = count(ids[b], keep[b], 4, config)
        assert elected.label[b] == label
        assert elected.share[b].item() == pytest.approx(share, rel=1e-6)
        assert bool(elected.tie[b]) == tie
        assert bool(elected.signal[b]) == (label >= 0 and share >= 0.4 and margin >= 0.2 - 1e-7)


@pytest.mark.parametrize(
    ("ids", "certainty", "num_policy", "config", "label", "share", "margin", "tie"),
    [
        ([1, 1, 1, 2], [1.0, 0.5, 0.5, 3.0], 4, {}, 2, 3 / 5, 1 / 5, False),
        ([1, 1, 2, 2], [2.0, 1.0, 0.5, 1.0], 2, {"momentum_weight": 3}, 2, 4.5 / 7.5, 1.5 / 7.5, False),
        ([1, 2, 2, -1], [1.0, 0.25, 0.25, 0.5], 4, {}, 1, 1 / 2, 1 / 4, False),
        ([5, 5, 7, 7], [1.5, 0.5, 1.25, 0.75], 3, {}, 7, 1 / 2, 0, True),
        ([7, 5, 5], [0.3, 0.1, 0.2], 3, {}, 7, 1 / 2, 0, True),
        ([1, 2, 2], [0.0, 0.5, 1.0], 3, {}, 2, 1, 1, False),
        ([1, 2, 2], [float("nan"), float("inf"), 1.0], 3, {}, 2, 1, 1, False),
        ([1, 2, 1], [-1e-7, 0.0, 0.0], 3, {}, -1, 0, 0, False),
    ],
    ids=[
        "one certain rollout outweighs three",
        "momentum weight multiplies",
        "an unparsed rollout counts in the total",
        "momentum decides a tie",
        "equal momentum votes fall to the earliest",
        "weight 0 elects nobody",
        "non-finite certainty elects nobody",
        "without weight there is no label",
    ],
)
def test_self_certainty_weighs_votes(ids, certainty, num_policy, config, label, share, margin, tie):
    evidence = Evidence(answer_ids=torch.tensor([ids]), num_policy=num_policy, self_certainty=torch.tensor([certainty]))

    def of(min_margin: float):
        options = VoteConfig(rule="self-certainty", min_margin=min_margin, **config)
        return vote(evidence, torch.ones(1, len(ids), dtype=torch.bool), options)

    elected = of(max(margin - 1e-5, 0))
    assert elected.label.tolist() == [label]
    assert elected.share.item() == pytest.approx(share, abs=1e-6)
    assert elected.tie.tolist() == [tie]
    assert elected.signal.tolist() == [label >= 0]
    if margin < 1:
        assert of(margin + 1e-5).signal.tolist() == [False]


def test_self_certainty_of_dropped_rollouts_weighs_nothing():
    evidence = Evidence(
        answer_ids=torch.tensor([[1, 2, 2]]), num_policy=3, self_certainty=torch.tensor([[1.0, 9.0, 0.5]])
    )
    elected = vote(evidence, torch.tensor([[True, False, True]]), VoteConfig(rule="self-certainty"))
    assert elected.label.tolist() == [1]
    assert elected.class_share.tolist()[0] == pytest.approx([2 / 3, 1 / 3, 1 / 3])


def test_first_of_class_is_the_earliest_text():
    assert first_of_class([2, 1, 1], ["a", "1/2", "0.5"], 1) == "1/2"
    assert first_of_class([-1, -1], [None, None], -1) is None


# Q1 = 2, Q3 = 4, so the lower fence of k = 0.75 is 0.5 and the upper one 5.5.
LEVEL = [2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("low", "high", "two_sided", "expected"),
    [
        (0.5, 5.0, False, [True, True]),
        (0.4999, 5.0, False, [False, True]),
        (0.5, 50.0, False, [True, True]),
        (0.5, 5.5, True, [True, True]),
        (0.5, 5.5001, True, [True, False]),
    ],
)
def test_filter_fence_is_strict(low, high, two_sided, expected):
    entropy = torch.tensor([[low, *LEVEL, high]])
    keep = filter_trajectories(entropy, FilterConfig(k=0.75, two_sided=two_sided))
    assert keep.tolist() == [[expected[0], True, True, True, expected[1]]]


def test_filter_quartiles_interpolate_linearly():
    # Q1 = 1.75 and Q3 = 3.25 at k = 1: fence 0.25; a nearest-rank quartile would put it elsewhere.
    for lowest, kept in ((0.2501, True), (0.2, False)):
        entropy = torch.tensor([[lowest, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]])
        q1, q3 = torch.quantile(entropy, 0.25).item(), torch.quantile(entropy, 0.75).item()
        assert (q1, q3) == (1.75, 3.25)
        assert filter_trajectories(entropy, FilterConfig(k=1.0)).tolist()[0][0] is kept


def test_filter_scope():
    entropy = torch.tensor([[1.0, 1.1, 1.2, 1.3], [0.1, 3.0, 3.1, 3.2]])
    assert filter_trajectories(entropy, FilterConfig(k=0.75, scope="batch")).all()
    assert filter_trajectories(entropy, FilterConfig(k=0.75, scope="prompt")).tolist() == [
        [True] * 4,
        [False, True, True, True],
    ]


def test_filter_is_skipped_for_few_or_equal_trajectories():
    assert filter_trajectories(torch.tensor([[0.0, 5.0, 6.0]]), FilterConfig(k=0.0)).all()
    assert filter_trajectories(torch.tensor([[0.0, 5.0], [6.0, 7.0]]), FilterConfig(k=0.0, scope="prompt")).all()
    assert not filter_trajectories(torch.tensor([[0.0, 5.0], [6.0, 7.0]]), FilterConfig(k=0.0)).all()
    assert filter_trajectories(torch.tensor([[0.0, 5.0, 5.0, 5.0, 5.0]]), FilterConfig(k=0.0)).all()


def test_filter_applies_to_none_keeps_everything():
    entropy = torch.tensor([[-9.0, *LEVEL, 5.0]])
    assert filter_trajectories(entropy, FilterConfig(applies_to="none")).all()
    for applies_to in ("vote-and-loss", "loss"):
        assert filter_trajectories(entropy, FilterConfig(applies_to=applies_to)).tolist()[0] == [False] + [True] * 4


def test_every_rule_is_an_option_and_every_option_a_rule():
    assert set(typing.get_args(typing.get_type_hints(VoteConfig)["rule"])) == set(VOTE_RULES)
    assert not any("correct" in rule.needs for rule in VOTE_RULES.values())  # a pseudo-label without labels


def test_a_rule_gets_what_it_needs_and_no_true_answer(monkeypatch):
    """A rule that elects the answer of the most certain rollout; true answers are known, for the reward."""
    seen = []

    def most_certain(evidence, voters, config, backend):
        seen.append(evidence.correct)
        weights = evidence.self_certainty.argsort().argsort().int()
        return K.majority_vote(evidence.answer_ids, keep=voters, weights=weights, backend=backend)

    monkeypatch.setitem(VOTE_RULES, "majority", VoteRule(most_certain, needs=("self_certainty",)))
    config, objective = VoteConfig(), ObjectiveConfig(reward="labels")
    assert needed_evidence(config, objective) == {
        "correct": "objective.reward labels",
        "self_certainty": "vote.rule majority",
    }
    credit = partial(
        assign_credit,
        [["7", "7", "9", "9"]],
        torch.ones(1, 4),
        4,
        filter=FilterConfig(applies_to="none"),
        vote=config,
        objective=objective,
        checker=AnswerChecker(mode="exact"),
        true_answers=["7"],
    )
    certainty = torch.tensor([[0.1, 0.2, 0.3, 5.0]])
    assert credit(self_certainty=certainty).labels == ["9"]
    assert credit(self_certainty=certainty.flip(1)).labels == ["7"]
    assert seen == [None, None]
    with pytest.raises(ValueError, match=r"self_certainty must be given for vote\.rule majority, got None"):
        credit()


@pytest.mark.parametrize("applies_to", ["vote-and-loss", "loss", "none"])
def test_a_trajectory_of_non_finite_entropy_never_votes(applies_to):
    entropy = torch.tensor([[torch.nan, torch.inf, 1.0, 1.0]])
    found = assign_credit(
        [["7", "7", "9", None]],
        entropy,
        4,
        filter=FilterConfig(applies_to=applies_to),
        vote=VoteConfig(),
        objective=ObjectiveConfig(),
        checker=AnswerChecker(mode="exact"),
    )
    assert found.labels == ["9"] and found.trains.tolist() == [[False, False, True, True]]


def test_the_largest_weights_do_not_overflow():
    ids = torch.tensor([[0] * 4095 + [1]])
    evidence = Evidence(answer_ids=ids, num_policy=0, self_certainty=torch.full(ids.shape, 1e30))
    elected = vote(
        evidence, torch.ones_like(ids, dtype=torch.bool), VoteConfig(rule="self-certainty", momentum_weight=10**6)
    )
    assert elected.label.tolist() == [0] and elected.share.item() == pytest.approx(4095 / 4096)
