from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mgrpo_kernels
from mgrpo_kernels.iqr_filter import reference
from mgrpo_kernels.testing import assert_mutants_rejected, on_argument


@pytest.fixture(params=["reference", "cpu", "triton"])
def iqr_filter(request):
    return partial(mgrpo_kernels.iqr_filter, backend=request.param)


def slow_filter(values: Tensor, used: list[bool], k: float, two_sided: bool) -> tuple[list[bool], Tensor, Tensor]:
    """One scope, entry by entry, with torch.quantile."""
    taken = values[torch.tensor(used)]
    if len(taken) == 0:
        return [False] * len(used), values.new_tensor(torch.nan), values.new_tensor(torch.nan)
    q1, q3 = torch.quantile(taken, 0.25), torch.quantile(taken, 0.75)
    iqr = q3 - q1
    kept = []
    for value, use in zip(values, used, strict=True):
        outside = value < q1 - k * iqr or (two_sided and value > q3 + k * iqr)
        kept.append(use and not (outside and len(taken) >= 4 and iqr >= 1e-6))
    return kept, q1, q3


def assert_equals_slow(op, entropy: Tensor, used: Tensor, k: float, two_sided: bool, poison: float = torch.nan) -> None:
    poisoned = entropy.masked_fill(~used, poison)
    out = op(poisoned, k=k, scope="batch", keep=used, two_sided=two_sided)
    kept, q1, q3 = slow_filter(entropy.flatten(), used.flatten().tolist(), k, two_sided)
    assert out.keep.flatten().tolist() == kept
    assert torch.equal(torch.stack([out.q1, out.q3]).nan_to_num(-9), torch.stack([q1, q3]).nan_to_num(-9))
    out = op(poisoned, k=k, scope="prompt", keep=used, two_sided=two_sided)
    for row, (values, use) in enumerate(zip(entropy, used, strict=True)):
        kept, q1, q3 = slow_filter(values, use.tolist(), k, two_sided)
        assert out.keep[row].tolist() == kept
        assert torch.equal(torch.stack([out.q1[row], out.q3[row]]).nan_to_num(-9), torch.stack([q1, q3]).nan_to_num(-9))


def check(op) -> None:
    generator = torch.Generator().manual_seed(2)
    entropy = torch.randn(10, 12, generator=generator).exp()
    used = torch.rand(10, 12, generator=generator) > 0.25
    for two_sided in (False, True):
        assert_equals_slow(op, entropy, used, 0.4, two_sided, poison=50.0)


def test_matches_a_loop_and_rejects_every_mutant(iqr_filter):
    extra = {
        "wider_fence": on_argument(("k",), lambda k: k * 1.3),
        "one_sided": on_argument(("two_sided",), lambda _: False),
    }
    assert_mutants_rejected(iqr_filter, check, extra=extra, without=("wrong_temperature",))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_property_against_torch_quantile(data):
    size = data.draw(st.integers(1, 9))
    prompts = data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    number = st.one_of(st.integers(0, 3).map(float), st.floats(0, 4, width=32))
    rows = st.lists(st.lists(number, min_size=size, max_size=size), min_size=prompts, max_size=prompts)
    flags = st.lists(st.lists(st.booleans(), min_size=size, max_size=size), min_size=prompts, max_size=prompts)
    entropy, used = torch.tensor(data.draw(rows), dtype=dtype), torch.tensor(data.draw(flags))
    k, two_sided = data.draw(st.sampled_from([0.0, 0.75, 1.5])), data.draw(st.booleans())
    for backend in ("reference", "auto"):
        assert_equals_slow(partial(mgrpo_kernels.iqr_filter, backend=backend), entropy, used, k, two_sided)


def assert_backends_agree(
    entropy: Tensor, k: float, scope: str, keep: Tensor | None, two_sided: bool, backend: str = "cpu"
) -> None:
    """The registered operation and the reference: equal bits."""
    found = torch.ops.mgrpo_kernels.iqr_filter(entropy, k, scope, keep, two_sided, backend)
    expected = reference.iqr_filter(entropy, k=k, scope=scope, keep=keep, two_sided=two_sided)
    for name, one, other in zip(expected._fields, found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, name
        assert torch.equal(one.nan_to_num(-9), other.nan_to_num(-9)), name


def shapes(largest: int) -> st.SearchStrategy:
    return st.fixed_dictionaries(
        {
            "prompts": st.integers(0, 4),
            "size": st.one_of(st.integers(1, 40), st.integers(41, largest)),
            "k": st.sampled_from([0.0, 0.3, 0.75, 1.5, 1e30]),
            "scope": st.sampled_from(["batch", "prompt"]),
            "share": st.sampled_from([None, 0.05, 0.7, 1.0]),
            "spread": st.sampled_from([0.0, 1e-6, 1.0, 1e38]),
            "wrong": st.sampled_from([None, torch.nan, torch.inf, -torch.inf]),
            "strided": st.booleans(),
            "two_sided": st.booleans(),
            "seed": st.integers(0, 1000),
        }
    )


def assert_any_shape(backend, prompts, size, k, scope, share, spread, wrong, strided, two_sided, seed):
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.randn(prompts, size, generator=generator) * spread + min(spread, 1.0)
    keep = None if share is None else torch.rand(prompts, size, generator=generator) < share
    if wrong is not None and prompts:
        entropy[-1, -1] = wrong
    if strided:
        entropy, keep = entropy.T.contiguous().T, None if keep is None else keep.T.contiguous().T
    assert_backends_agree(entropy, k, scope, keep, two_sided, backend)


@settings(max_examples=80, deadline=None)
@given(case=shapes(1500))
def test_any_shape_stride_and_number(case):
    assert_any_shape("cpu", **case)


@settings(max_examples=30, deadline=None)
@given(case=shapes(300))
def test_any_shape_stride_and_number_on_triton(case):
    assert_any_shape("triton", **case)


@pytest.mark.parametrize("shape", [(2, 9000), (64, 1024)])
def test_more_than_a_tile_on_triton(shape):
    generator = torch.Generator().manual_seed(1)
    entropy, keep = torch.randn(shape, generator=generator).exp(), torch.rand(shape, generator=generator) > 0.3
    assert_backends_agree(entropy, 0.3, "batch", keep, True, "triton")
    assert_backends_agree(entropy[:2], 0.3, "prompt", keep[:2], True, "triton")


def test_too_many_entries_for_triton_are_refused():
    with pytest.raises(ValueError, match=r"^iqr_filter: entropy must be of at most 1048576 .*, got 1048577\. "):
        mgrpo_kernels.iqr_filter(torch.rand(1, 2**20 + 1), backend="triton")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_result_is_written(backend):
    op = partial(mgrpo_kernels.iqr_filter, backend=backend)
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        check(op)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("scope", ["batch", "prompt"])
def test_the_thread_count_changes_no_bit(scope):
    entropy = torch.rand(2100, 33, generator=torch.Generator().manual_seed(3))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(mgrpo_kernels.iqr_filter(entropy, scope=scope, backend="cpu"))
            assert_backends_agree(entropy, 0.75, scope, None, False)
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_no_gradient_passes(iqr_filter):
    for scope in ("batch", "prompt"):
        out = iqr_filter(torch.rand(3, 5).requires_grad_(), scope=scope)
        assert not out.q1.requires_grad and not out.q3.requires_grad


def test_opcheck_and_meta():
    entropy, keep = torch.rand(3, 8), torch.rand(3, 8) > 0.2
    for scope in ("batch", "prompt"):
        torch.library.opcheck(torch.ops.mgrpo_kernels.iqr_filter, (entropy, 0.75, scope, keep, True, "cpu"))
        torch.library.opcheck(torch.ops.mgrpo_kernels.iqr_filter, (entropy, 0.75, scope, None, False, "cpu"))
        expected = mgrpo_kernels.iqr_filter(entropy, scope=scope)
        for backend in ("auto", "cpu", "triton"):
            out = mgrpo_kernels.iqr_filter(entropy.to("meta"), scope=scope, backend=backend)
            assert [tensor.device.type for tensor in out] == ["meta"] * 3
            assert [(one.shape, one.dtype) for one in out] == [(two.shape, two.dtype) for two in expected]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 100, 511, 4096])
def test_quartiles_are_bit_equal_to_torch_quantile(iqr_filter, count):
    entropy = torch.rand(1, count, generator=torch.Generator().manual_seed(count)) * 7
    out = iqr_filter(entropy)
    assert torch.equal(torch.stack([out.q1, out.q3]), torch.quantile(entropy, torch.tensor([0.25, 0.75])))


def test_the_fence_is_strict_and_needs_a_spread_and_four_entries(iqr_filter):
    on_fence = torch.tensor([[0.0, 4.0, 4.0, 8.0, 8.0]])  # q1 = 4, q3 = 8: the fence at k = 1 is 0
    assert iqr_filter(on_fence, k=1.0).keep.all()
    assert iqr_filter(on_fence, k=0.99).keep.tolist() == [[False, True, True, True, True]]
    assert iqr_filter(torch.tensor([[0.0, 5.0, 5.0, 5.0, 5.0]])).keep.all()
    three = torch.tensor([[0.0, 9.0, 9.5]])
    assert iqr_filter(three, k=0.0).keep.all()
    assert not iqr_filter(torch.tensor([[0.0, 9.0, 9.5, 9.7]]), k=0.0).keep.all()


def test_entries_left_out_stay_out_and_an_empty_batch_is_empty(iqr_filter):
    used = torch.tensor([[True, False, True]])
    out = iqr_filter(torch.tensor([[1.0, torch.nan, 2.0]]), keep=used)
    assert torch.equal(out.keep, used)
    empty = iqr_filter(torch.zeros(0, 3))
    assert empty.keep.shape == (0, 3) and empty.q1.isnan()
    assert iqr_filter(torch.zeros(0, 3), scope="prompt").q3.shape == (0,)


def test_compiles_whole(iqr_filter):
    entropy = torch.rand(3, 8)
    compiled = torch.compile(lambda entropy: iqr_filter(entropy), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tuple(compiled(entropy)), tuple(iqr_filter(entropy)))
    # A compiler's graph reads no values: what is not finite makes the quartiles NaN there, and drops nothing.
    out = compiled(entropy.masked_fill(entropy == entropy.max(), torch.inf))
    assert out.q1.isnan() and out.q3.isnan() and out.keep.all()


H = torch.rand(2, 3)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"entropy must be of shape \[B, G\]", {"entropy": H[0]}),
        ("entropy must be .* G >= 1", {"entropy": H[:, :0]}),
        ("entropy must be of dtype float32 or float64", {"entropy": H.bfloat16()}),
        ("entropy must be finite, got nan", {"entropy": H.masked_fill(H == H[0, 0], torch.nan)}),
        ("entropy must be finite, got inf", {"entropy": H + torch.inf, "keep": torch.ones(2, 3).bool()}),
        ("entropy must be finite, got nan", {"entropy": H.masked_fill(H == H[1, 2], torch.nan), "scope": "prompt"}),
        ("keep must be of dtype bool", {"keep": H}),
        ("k must be a finite number", {"k": -0.5}),
        ("scope must be one of", {"scope": "group"}),
        ("backend must be one of", {"backend": "none"}),
    ],
)
def test_wrong_arguments_are_refused(iqr_filter, message, arguments):
    with pytest.raises(ValueError, match=f"^iqr_filter: {message}"):
        iqr_filter(**({"entropy": H} | arguments))
