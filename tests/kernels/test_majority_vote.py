from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo_kernels import majority_vote
from mgrpo_kernels.testing import assert_mutants_rejected, on_argument


def slow_vote(ids: list[int], keep: list[bool], weights: list[int], tie_break: list[bool]):
    """One prompt, with a Counter: label, share, margin, tie, class shares."""
    votes, preferred, earliest = Counter(), Counter(), {}
    kept = 0
    for index, (answer, used, weight, prefers) in enumerate(zip(ids, keep, weights, tie_break, strict=True)):
        if not used or weight == 0:
            continue
        kept += weight
        if answer < 0:
            continue
        votes[answer] += weight
        preferred[answer] += weight * prefers
        earliest.setdefault(answer, index)
    shares = [votes[answer] / kept if answer >= 0 and kept else 0.0 for answer in ids]
    if not votes:
        return -1, 0.0, 0.0, False, shares
    ranked = sorted(votes, key=lambda answer: (-votes[answer], -preferred[answer], earliest[answer]))
    label = ranked[0]
    second = max((votes[answer] for answer in ranked[1:]), default=0)
    return label, votes[label] / kept, (votes[label] - second) / kept, votes[label] == second, shares


def assert_equals_slow(vote, ids, keep, weights, tie_break) -> None:
    assert vote.label.dtype == torch.int64 and vote.tie.dtype == torch.bool
    assert vote.share.dtype == vote.margin.dtype == vote.class_share.dtype == torch.float32
    for row, arguments in enumerate(zip(ids, keep, weights, tie_break, strict=True)):
        label, share, margin, tie, shares = slow_vote(*(argument.tolist() for argument in arguments))
        assert (int(vote.label[row]), bool(vote.tie[row])) == (label, tie)
        expected = torch.tensor([share, margin, *shares])
        torch.testing.assert_close(torch.stack([vote.share[row], vote.margin[row], *vote.class_share[row]]), expected)


def check(op) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 4, (24, 9), generator=generator) * 1_000_000_007
    ids.clamp_(min=-1)
    keep = torch.rand(24, 9, generator=generator) > 0.3
    weights = torch.randint(0, 4, (24, 9), generator=generator, dtype=torch.int32)
    tie_break = (torch.arange(9) >= 6).expand(24, 9)
    assert_equals_slow(op(ids, keep=keep, weights=weights, tie_break=tie_break), ids, keep, weights, tie_break)
    ones = torch.ones_like(weights)
    assert_equals_slow(op(ids, keep=keep, tie_break=tie_break), ids, keep, ones, tie_break)
    assert_equals_slow(op(ids, keep=keep), ids, keep, ones, torch.zeros_like(keep))


def test_matches_a_counter_and_rejects_every_mutant():
    extra = {
        "dropped_weights": on_argument(("weights",), torch.ones_like),
        "dropped_tie_break": on_argument(("tie_break",), torch.zeros_like),
    }
    assert_mutants_rejected(majority_vote, check, extra=extra, without=("wrong_temperature",))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_property_against_a_counter(data):
    size = data.draw(st.integers(1, 7))
    prompts = data.draw(st.integers(1, 3))

    def draw(element) -> torch.Tensor:
        row = st.lists(element, min_size=size, max_size=size)
        return torch.tensor(data.draw(st.lists(row, min_size=prompts, max_size=prompts)))

    ids, keep = draw(st.integers(-1, 2)), draw(st.booleans())
    weights, tie_break = draw(st.integers(0, 3)), draw(st.booleans())
    vote = majority_vote(ids, keep=keep, weights=weights, tie_break=tie_break)
    assert_equals_slow(vote, ids, keep, weights, tie_break)


def test_a_tie_goes_to_momentum_then_to_the_earliest():
    ids = torch.tensor([[7, 5, 5, 7, 9, 9]])
    assert majority_vote(ids).label.item() == 7
    momentum = torch.tensor([[False, False, False, False, False, True]])
    vote = majority_vote(ids, tie_break=momentum)
    assert vote.label.item() == 9 and vote.tie.item() and vote.margin.item() == 0
    dropped = torch.tensor([[False, True, True, True, True, True]])
    assert majority_vote(torch.tensor([[7, 5, 7, 5, -1, -1]]), keep=dropped).label.item() == 5


def test_unparsed_rollouts_count_in_the_denominator_alone():
    vote = majority_vote(torch.tensor([[3, -1, -1, 4, 3]]))
    torch.testing.assert_close(vote.share, torch.tensor([0.4]))
    torch.testing.assert_close(vote.margin, torch.tensor([0.2]))
    torch.testing.assert_close(vote.class_share, torch.tensor([[0.4, 0.0, 0.0, 0.2, 0.4]]))
    assert not vote.tie.item()


def test_nobody_votes():
    ids = torch.tensor([[-1, -1], [4, 4], [4, 4]])
    keep = torch.tensor([[True, True], [False, False], [True, True]])
    weights = torch.tensor([[1, 1], [1, 1], [0, 0]])
    vote = majority_vote(ids, keep=keep, weights=weights)
    assert vote.label.tolist() == [-1, -1, -1] and not vote.tie.any()
    for values in (vote.share, vote.margin, vote.class_share):
        assert torch.equal(values, torch.zeros_like(values))
    assert majority_vote(ids[:0]).label.shape == (0,)


def test_non_voters_get_the_share_of_their_answer():
    vote = majority_vote(torch.tensor([[1, 1, 2, 1]]), keep=torch.tensor([[True, False, True, False]]))
    torch.testing.assert_close(vote.class_share, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))


def test_compiles_whole():
    ids = torch.randint(-1, 3, (4, 6))
    compiled = torch.compile(majority_vote, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tuple(compiled(ids)), tuple(majority_vote(ids)))


IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"answer_ids must be of shape \[B, G\]", {"answer_ids": IDS[0]}),
        ("answer_ids must be .* G >= 1", {"answer_ids": IDS[:, :0]}),
        ("answer_ids must be of dtype int64", {"answer_ids": IDS.int()}),
        ("answer_ids must be >= -1, got -2", {"answer_ids": IDS - 2}),
        ("keep must be of dtype bool", {"keep": IDS}),
        (r"weights must be of shape \[B, G\] = \[2, 3\]", {"weights": IDS[:1]}),
        ("weights must be of dtype int32 or int64", {"weights": IDS.float()}),
        ("weights must be >= 0, got -1", {"weights": IDS - 1}),
        ("tie_break must be of dtype bool", {"tie_break": IDS}),
        ("backend must be one of", {"backend": "none"}),
    ],
)
def test_wrong_arguments_are_refused(message, arguments):
    with pytest.raises(ValueError, match=f"^majority_vote: {message}"):
        majority_vote(**({"answer_ids": IDS} | arguments))
