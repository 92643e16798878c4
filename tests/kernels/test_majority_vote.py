from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import assert_pass_on

import mgrpo_kernels
from mgrpo_kernels.majority_vote import reference
from mgrpo_kernels.testing import assert_mutants_rejected, on_argument


@pytest.fixture(params=["reference", "cpu", "triton"])
def majority_vote(request):
    return partial(mgrpo_kernels.majority_vote, backend=request.param)


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


def test_matches_a_counter_and_rejects_every_mutant(majority_vote):
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
    for backend in ("reference", "cpu", "triton"):
        vote = mgrpo_kernels.majority_vote(ids, keep=keep, weights=weights, tie_break=tie_break, backend=backend)
        assert_equals_slow(vote, ids, keep, weights, tie_break)


def assert_backends_agree(*arguments: torch.Tensor | None, backend: str = "cpu") -> None:
    """The registered operation and the reference, on ids, keep, weights and tie_break: equal bits."""
    names = ("answer_ids", "keep", "weights", "tie_break")
    expected = reference.majority_vote(**dict(zip(names, arguments, strict=True)))
    *found, lowest = torch.ops.mgrpo_kernels.majority_vote(*arguments, backend)
    for values, allowed, least in zip(arguments[::2], (-1, 0), lowest.tolist(), strict=True):
        real = allowed if values is None or values.numel() == 0 else int(values.min())
        assert least == real if real < allowed else least >= allowed
    for name, one, other in zip(expected._fields, found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name


def shapes(*sizes: int) -> st.SearchStrategy:
    return st.fixed_dictionaries(
        {
            "prompts": st.integers(0, 4),
            "size": st.one_of(st.sampled_from(sizes), st.integers(1, 80)),
            "answers": st.sampled_from([1, 2, 9, 1000]),
            "scale": st.sampled_from([1, 1_000_003, 2**31 + 1, 2**52]),
            "most": st.sampled_from([None, 1, 3, 2**25 - 1, 2**25, 2**30]),
            "wide": st.booleans(),
            "with_keep": st.booleans(),
            "with_tie_break": st.booleans(),
            "strided": st.booleans(),
            "seed": st.integers(0, 1000),
        }
    )


def assert_any_shape(backend, prompts, size, answers, scale, most, wide, with_keep, with_tie_break, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, size)
    ids = torch.randint(-2, answers, shape, generator=generator)
    ids = torch.where(ids < 0, ids, ids * scale)
    keep = torch.rand(shape, generator=generator) > 0.3 if with_keep else None
    tie_break = torch.rand(shape, generator=generator) > 0.5 if with_tie_break else None
    weights = None
    if most is not None:
        weights = torch.randint(-1, 2, shape, generator=generator) * most
        weights = weights if wide else weights.int()
    arguments = [ids, keep, weights, tie_break]
    if strided:
        arguments = [None if tensor is None else tensor.T.contiguous().T for tensor in arguments]
    assert_backends_agree(*arguments, backend=backend)


@settings(max_examples=80, deadline=None)
@given(case=shapes(1, 15, 16, 17, 63, 64, 65, 128, 700))
def test_any_shape_stride_size_and_number(case):
    assert_any_shape("cpu", **case)


@settings(max_examples=30, deadline=None)
@given(case=shapes(1, 16, 17, 64, 65))
def test_any_shape_stride_size_and_number_on_triton(case):
    assert_any_shape("triton", **case)


def test_large_groups_on_triton():
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(-1, 200, (1, 1024), generator=generator)
    flags = torch.rand(2, 1, 1024, generator=generator) > 0.3
    assert_backends_agree(ids, flags[0], None, flags[1], backend="triton")
    with pytest.raises(ValueError, match=r"^majority_vote: answer_ids must be of at most 4096 .*, got 4097\. "):
        mgrpo_kernels.majority_vote(torch.zeros(1, 4097, dtype=torch.int64), backend="triton")


def test_large_groups_against_a_counter():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 900, (3, 5000), generator=generator)
    keep = torch.rand(3, 5000, generator=generator) > 0.2
    weights = torch.randint(0, 3, (3, 5000), generator=generator)
    tie_break = torch.rand(3, 5000, generator=generator) > 0.5
    vote = mgrpo_kernels.majority_vote(ids, keep=keep, weights=weights, tie_break=tie_break, backend="cpu")
    assert_equals_slow(vote, ids, keep, weights, tie_break)


def test_ids_that_meet_in_the_hash_table():
    # Multiples of 2^57 differ in the hash's highest bits alone; multiples of the inverse of its factor are neighbours.
    inverse = pow(0x9E3779B97F4A7C15, -1, 2**64)
    neighbours = [number * inverse % 2**63 for number in range(300)]
    ids = torch.tensor([neighbours, [(number % 64) << 57 for number in range(300)]])
    assert_backends_agree(ids, None, None, None)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_result_is_written(backend):
    op = partial(mgrpo_kernels.majority_vote, backend=backend)
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        check(op)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", [32, 257])
def test_the_thread_count_changes_no_bit(size):
    ids = torch.randint(-1, 20, (3000, size), generator=torch.Generator().manual_seed(3))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(mgrpo_kernels.majority_vote(ids, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    assert_backends_agree(ids[::300], None, None, None)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_agrees(isa):
    assert_pass_on(isa, __file__, "any_shape or hash_table")


def test_opcheck_and_meta():
    ids, flags = torch.randint(-1, 3, (4, 6)), torch.rand(4, 6) > 0.3
    vote = torch.ops.mgrpo_kernels.majority_vote
    torch.library.opcheck(vote, (ids, None, None, None, "cpu"))
    for dtype in (torch.int32, torch.int64):
        torch.library.opcheck(vote, (ids, flags, torch.ones(4, 6, dtype=dtype), flags, "cpu"))
    expected = mgrpo_kernels.majority_vote(ids)
    for backend in ("auto", "cpu", "triton"):
        out = mgrpo_kernels.majority_vote(ids.to("meta"), backend=backend)
        assert [tensor.device.type for tensor in out] == ["meta"] * 5
        assert [(one.shape, one.dtype) for one in out] == [(two.shape, two.dtype) for two in expected]


def test_a_tie_goes_to_momentum_then_to_the_earliest(majority_vote):
    ids = torch.tensor([[7, 5, 5, 7, 9, 9]])
    assert majority_vote(ids).label.item() == 7
    momentum = torch.tensor([[False, False, False, False, False, True]])
    vote = majority_vote(ids, tie_break=momentum)
    assert vote.label.item() == 9 and vote.tie.item() and vote.margin.item() == 0
    dropped = torch.tensor([[False, True, True, True, True, True]])
    assert majority_vote(torch.tensor([[7, 5, 7, 5, -1, -1]]), keep=dropped).label.item() == 5


def test_unparsed_rollouts_count_in_the_denominator_alone(majority_vote):
    vote = majority_vote(torch.tensor([[3, -1, -1, 4, 3]]))
    torch.testing.assert_close(vote.share, torch.tensor([0.4]))
    torch.testing.assert_close(vote.margin, torch.tensor([0.2]))
    torch.testing.assert_close(vote.class_share, torch.tensor([[0.4, 0.0, 0.0, 0.2, 0.4]]))
    assert not vote.tie.item()


def test_nobody_votes(majority_vote):
    ids = torch.tensor([[-1, -1], [4, 4], [4, 4]])
    keep = torch.tensor([[True, True], [False, False], [True, True]])
    weights = torch.tensor([[1, 1], [1, 1], [0, 0]])
    vote = majority_vote(ids, keep=keep, weights=weights)
    assert vote.label.tolist() == [-1, -1, -1] and not vote.tie.any()
    for values in (vote.share, vote.margin, vote.class_share):
        assert torch.equal(values, torch.zeros_like(values))
    assert majority_vote(ids[:0]).label.shape == (0,)


def test_non_voters_get_the_share_of_their_answer(majority_vote):
    vote = majority_vote(torch.tensor([[1, 1, 2, 1]]), keep=torch.tensor([[True, False, True, False]]))
    torch.testing.assert_close(vote.class_share, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))


def test_compiles_whole(majority_vote):
    ids = torch.randint(-1, 3, (4, 6))
    compiled = torch.compile(lambda ids: majority_vote(ids), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tuple(compiled(ids)), tuple(majority_vote(ids)))
    # A compiler's graph reads no values: an id below -1 is no answer there.
    torch.testing.assert_close(tuple(compiled(ids * 7)), tuple(majority_vote((ids * 7).clamp_min(-1))))


IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"answer_ids must be of shape \[B, G\]", {"answer_ids": IDS[0]}),
        ("answer_ids must be .* G >= 1", {"answer_ids": IDS[:, :0]}),
        ("answer_ids must be of dtype int64", {"answer_ids": IDS.int()}),
        ("answer_ids must be >= -1, got -2", {"answer_ids": IDS - 2}),
        ("answer_ids must be >= -1, got -7", {"answer_ids": torch.tensor([[2**63 - 1, -1, -7]])}),
        ("keep must be of dtype bool", {"keep": IDS}),
        (r"weights must be of shape \[B, G\] = \[2, 3\]", {"weights": IDS[:1]}),
        ("weights must be of dtype int32 or int64", {"weights": IDS.float()}),
        ("weights must be >= 0, got -1", {"weights": IDS - 1}),
        ("weights must be >= 0, got -3", {"weights": torch.tensor([[1, 2, 3], [4, 5, -3]], dtype=torch.int32)}),
        ("tie_break must be of dtype bool", {"tie_break": IDS}),
        ("backend must be one of", {"backend": "none"}),
    ],
)
def test_wrong_arguments_are_refused(majority_vote, message, arguments):
    with pytest.raises(ValueError, match=f"^majority_vote: {message}"):
        majority_vote(**({"answer_ids": IDS} | arguments))
