from __future__ import annotations

import statistics
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mgrpo_kernels
from mgrpo_kernels.testing import assert_mutants_rejected, assert_within_budget, poison_masked

MODES = ("std", "mean", "leave_one_out", "sign")


@pytest.fixture(params=["reference", "cpu", "triton"])
def group_advantage(request):
    return partial(mgrpo_kernels.group_advantage, backend=request.param)


def slow_group(rewards: list[float], keep: list[bool], mode: str) -> list[float]:
    kept = [reward for reward, used in zip(rewards, keep, strict=True) if used]
    if len(set(kept)) < 2:
        return [0.0] * len(rewards)
    mean = statistics.fmean(kept)
    rules = {
        "std": lambda r: (r - mean) / (statistics.stdev(kept) + 1e-6),
        "mean": lambda r: r - mean,
        "leave_one_out": lambda r: r - (sum(kept) - r) / (len(kept) - 1),
        "sign": lambda r: 2 * r - 1,
    }
    return [rules[mode](reward) if used else 0.0 for reward, used in zip(rewards, keep, strict=True)]


def slow(rewards: Tensor, keep: Tensor, mode: str) -> Tensor:
    rows = [slow_group(r, k, mode) for r, k in zip(rewards.tolist(), keep.tolist(), strict=True)]
    return torch.tensor(rows, dtype=torch.float64).reshape(rewards.shape)


def check(op) -> None:
    generator = torch.Generator().manual_seed(1)
    rewards = torch.rand(9, 8, generator=generator) + 5
    keep = torch.rand(9, 8, generator=generator) > 0.3
    for mode in MODES:
        actual = op(poison_masked(rewards, keep), keep=keep, mode=mode)
        oracle = slow(rewards, keep, mode)
        assert actual.dtype == torch.float32
        assert torch.equal(actual[~keep], torch.zeros(int((~keep).sum())))
        # The mean of rewards near 5 is itself rounded: its error passes to every difference, divided by the spread.
        baseline = oracle + (oracle.abs() > 0) * 5 * torch.finfo(torch.float32).eps / (0.25 if mode == "std" else 1)
        assert_within_budget(actual, oracle, baseline, reduction_length=8, what=mode)


def test_matches_a_loop_and_rejects_every_mutant(group_advantage):
    assert_mutants_rejected(group_advantage, check, without=("wrong_temperature",))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_property_against_a_loop(data):
    size = data.draw(st.integers(1, 6))
    row = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=size, max_size=size)
    flags = st.lists(st.booleans(), min_size=size, max_size=size)
    rewards = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=4)), dtype=torch.float64)
    keep = torch.tensor([data.draw(flags) for _ in range(len(rewards))])
    for mode in MODES:
        advantage = mgrpo_kernels.group_advantage(rewards, keep=keep, mode=mode)
        assert advantage.dtype == torch.float64
        torch.testing.assert_close(advantage, slow(rewards, keep, mode))


SHAPES = st.fixed_dictionaries(
    {
        "prompts": st.integers(0, 5),
        "size": st.integers(1, 70),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "share": st.sampled_from([None, 0.05, 0.6, 1.0]),
        "levels": st.sampled_from([2, 5, 1000]),
        "strided": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


def assert_any_shape(backend, prompts, size, dtype, share, levels, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = (torch.randint(0, levels, (prompts, size), generator=generator) / levels).to(dtype)
    keep = None if share is None else torch.rand(prompts, size, generator=generator) < share
    if keep is not None:
        rewards = poison_masked(rewards, keep)
    if strided:
        rewards, keep = rewards.T.contiguous().T, None if keep is None else keep.T.contiguous().T
    for mode in MODES:
        found = [
            mgrpo_kernels.group_advantage(rewards.to(to), keep=keep, mode=mode, backend=name)
            for to, name in ((dtype, backend), (torch.float64, "reference"), (dtype, "reference"))
        ]
        assert found[0].dtype == torch.float32
        assert_within_budget(*found, reduction_length=size, what=mode)


@settings(max_examples=60, deadline=None)
@given(case=SHAPES)
def test_any_shape_stride_and_dtype(case):
    assert_any_shape("cpu", **case)


@settings(max_examples=20, deadline=None)
@given(case=SHAPES)
def test_any_shape_stride_and_dtype_on_triton(case):
    assert_any_shape("triton", **case)


def test_large_groups_on_triton():
    for size in (1024, 3001):
        assert_any_shape("triton", 2, size, torch.float32, 0.6, 1000, False, 0)
    rewards = torch.rand(1, 8193)
    with pytest.raises(ValueError, match=r"^group_advantage: rewards must be of at most 8192 rollouts .*, got 8193\. "):
        mgrpo_kernels.group_advantage(rewards, backend="triton")


def test_a_group_does_not_depend_on_the_others_on_triton():
    rewards, keep = torch.rand(70, 9), torch.rand(70, 9) > 0.3
    whole = mgrpo_kernels.group_advantage(rewards, keep=keep, backend="triton")
    for start, end in ((3, 4), (40, 70)):
        part = mgrpo_kernels.group_advantage(rewards[start:end], keep=keep[start:end], backend="triton")
        assert torch.equal(part, whole[start:end])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_result_is_written(backend):
    op = partial(mgrpo_kernels.group_advantage, backend=backend)
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        check(op)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_thread_count_changes_no_bit():
    rewards = torch.rand(1100, 251, generator=torch.Generator().manual_seed(3))
    keep = torch.rand(1100, 251, generator=torch.Generator().manual_seed(4)) > 0.2
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(mgrpo_kernels.group_advantage(rewards, keep=keep, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert_within_budget(
        found[0],
        mgrpo_kernels.group_advantage(rewards.double(), keep=keep),
        mgrpo_kernels.group_advantage(rewards, keep=keep, backend="reference"),
        reduction_length=251,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_passes_as_in_the_reference(mode, value):
    rewards = torch.tensor([[value, 1.0, 0.0, 1.0], [1.0, value, 1.0, 1.0], [value] * 4])
    for keep in (None, torch.tensor([[True] * 4, [False, True, False, False], [True] * 4])):
        *found, expected = (
            mgrpo_kernels.group_advantage(rewards, keep=keep, mode=mode, backend=name)
            for name in ("cpu", "triton", "reference")
        )
        for advantage in found:
            torch.testing.assert_close(advantage, expected, rtol=0, atol=0, equal_nan=True)


def test_no_gradient_passes(group_advantage):
    for mode in MODES:
        advantage = group_advantage(torch.tensor([[1.0, 0.0, 0.5]], requires_grad=True), mode=mode)
        assert not advantage.requires_grad and advantage.count_nonzero() >= 2


def test_opcheck_and_meta():
    rewards, keep = torch.rand(3, 5), torch.rand(3, 5) > 0.2
    for mode in MODES:
        torch.library.opcheck(torch.ops.mgrpo_kernels.group_advantage, (rewards, keep, mode, "cpu"))
    torch.library.opcheck(torch.ops.mgrpo_kernels.group_advantage, (rewards.bfloat16(), None, "std", "cpu"))
    for backend in ("auto", "cpu", "triton"):
        out = mgrpo_kernels.group_advantage(rewards.half().to("meta"), backend=backend)
        assert (out.device.type, out.shape, out.dtype) == ("meta", (3, 5), torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_groups_without_a_signal_give_zero(group_advantage, mode):
    rewards = torch.tensor([[0.1] * 4, [1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    keep = torch.tensor([[True] * 4, [True, False, False, False], [False] * 4])
    assert torch.equal(group_advantage(rewards, keep=keep, mode=mode), torch.zeros(3, 4))
    assert torch.equal(group_advantage(torch.ones(3, 1), mode=mode), torch.zeros(3, 1))
    assert group_advantage(torch.zeros(0, 4), mode=mode).shape == (0, 4)


def test_large_mean_does_not_cancel_the_variance(group_advantage):
    rewards = torch.tensor([[4096.0, 4097.0, 4098.0, 4099.0]])
    expected = slow(rewards - 4096, torch.ones(1, 4, dtype=torch.bool), "std")
    torch.testing.assert_close(group_advantage(rewards).double(), expected, rtol=1e-6, atol=0)


def test_nan_reward_spoils_only_its_group(group_advantage):
    rewards = torch.tensor([[1.0, torch.nan, 0.0], [1.0, 0.0, 0.0]])
    advantage = group_advantage(rewards)
    alone = torch.tensor([[False, True, False], [True, True, True]])
    assert torch.equal(group_advantage(rewards, keep=alone)[0], torch.zeros(3))
    assert advantage[0].isnan().all() and torch.equal(advantage[1:], group_advantage(rewards[1:]))


def test_compiles_whole(group_advantage):
    rewards = torch.rand(3, 5)
    compiled = torch.compile(lambda rewards: group_advantage(rewards), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rewards), group_advantage(rewards))


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"rewards must be of shape \[B, G\]", {"rewards": torch.zeros(3)}),
        (r"rewards must be of shape \[B, G\] with G >= 1", {"rewards": torch.zeros(3, 0)}),
        ("rewards must be of dtype", {"rewards": torch.zeros(2, 3, dtype=torch.int64)}),
        (r"keep must be of shape \[B, G\] = \[2, 3\]", {"keep": torch.ones(2, 2).bool()}),
        ("keep must be of dtype bool", {"keep": torch.ones(2, 3)}),
        ("mode must be one of .* got 'rank'", {"mode": "rank"}),
        ("backend must be one of", {"backend": "none"}),
    ],
)
def test_wrong_arguments_are_refused(group_advantage, message, arguments):
    with pytest.raises(ValueError, match=f"^group_advantage: {message}"):
        group_advantage(**({"rewards": torch.zeros(2, 3)} | arguments))
