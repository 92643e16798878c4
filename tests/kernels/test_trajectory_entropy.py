from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mgrpo_kernels
from mgrpo_kernels.testing import assert_mutants_rejected, assert_within_budget, poison_masked

LENGTHS = [3, 0, 7, 1, 12]
CU_SEQLENS = torch.tensor([0, 3, 3, 10, 11, 23], dtype=torch.int32)


@pytest.fixture(params=["reference", "cpu", "triton"])
def trajectory_entropy(request):
    return partial(mgrpo_kernels.trajectory_entropy, backend=request.param)


def make_tokens() -> Tensor:
    return torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(0)) * 3


def padded(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed tokens -> [N, L] with NaN, and the mask; tokens start at different columns."""
    mask = torch.zeros(len(LENGTHS), 16, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        mask[row, row // 2 : row // 2 + length] = True
    values = torch.full(mask.shape, torch.nan, dtype=tokens.dtype)
    values[mask] = tokens
    return values, mask


def slow(tokens: Tensor, reduce: str, dtype: torch.dtype) -> Tensor:
    totals = [part.to(dtype).sum() for part in tokens.split(LENGTHS)]
    if reduce == "mean":
        totals = [total / max(length, 1) for total, length in zip(totals, LENGTHS, strict=True)]
    return torch.stack(totals)


def check(op) -> None:
    tokens = make_tokens()
    values, mask = padded(tokens)
    for reduce in ("mean", "sum"):
        exact, rounded = (slow(tokens, reduce, dtype) for dtype in (torch.float64, torch.float32))
        for actual in (op(tokens, cu_seqlens=CU_SEQLENS, reduce=reduce), op(values, mask=mask, reduce=reduce)):
            assert actual.dtype == torch.float32
            assert_within_budget(actual, exact, rounded, reduction_length=max(LENGTHS), what=reduce)


def test_matches_a_loop_and_rejects_every_mutant(trajectory_entropy):
    assert_mutants_rejected(trajectory_entropy, check, without=("wrong_temperature",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_accumulates_in_fp32_or_fp64(trajectory_entropy, dtype):
    if dtype == torch.float64:
        trajectory_entropy = partial(trajectory_entropy, backend="auto")
    tokens = torch.full((4000,), 1.0 / 3).to(dtype)
    total = trajectory_entropy(tokens, cu_seqlens=torch.tensor([0, 4000]), reduce="sum")
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(total.double(), tokens.double().sum()[None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_gradcheck(reduce):
    tokens = make_tokens().double().requires_grad_()
    reference = partial(mgrpo_kernels.trajectory_entropy, cu_seqlens=CU_SEQLENS, reduce=reduce)
    assert torch.autograd.gradcheck(reference, tokens)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_gradients(trajectory_entropy, reduce):
    upstream = torch.arange(1.0, 6.0)
    lengths = torch.tensor(LENGTHS)
    each = upstream / lengths.clamp_min(1) if reduce == "mean" else upstream
    packed = make_tokens().requires_grad_()
    (trajectory_entropy(packed, cu_seqlens=CU_SEQLENS, reduce=reduce) * upstream).sum().backward()
    assert torch.equal(packed.grad, each.repeat_interleave(lengths))
    values, mask = padded(make_tokens())
    leaf = poison_masked(values, mask).requires_grad_()
    (trajectory_entropy(leaf, mask=mask, reduce=reduce) * upstream).sum().backward()
    assert torch.equal(leaf.grad, torch.where(mask, each[:, None], 0))


def test_no_sequences_and_no_tokens(trajectory_entropy):
    assert trajectory_entropy(torch.zeros(0), cu_seqlens=torch.tensor([0])).shape == (0,)
    assert trajectory_entropy(torch.zeros(0), cu_seqlens=torch.tensor([0, 0, 0])).tolist() == [0.0, 0.0]
    for shape in ((0, 3), (2, 0), (0, 0)):
        leaf = torch.zeros(shape, requires_grad=True)
        out = trajectory_entropy(leaf, mask=torch.zeros(shape, dtype=torch.bool))
        out.sum().backward()
        assert out.tolist() == [0.0] * shape[0] and leaf.grad.shape == shape
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert trajectory_entropy(torch.full((2, 3), torch.nan), mask=nothing).tolist() == [0.0, 0.0]


def split(mask: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Padded tokens -> packed, with int64 boundaries."""
    return values[mask], torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])


ANYTHING = {
    "sequences": st.integers(0, 5),
    "length": st.integers(0, 1100),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "kept": st.sampled_from(["all", "none", "prefix", "random"]),
    "strided": st.booleans(),
    "reduce": st.sampled_from(["mean", "sum"]),
    "seed": st.integers(0, 1000),
}


def check_anything(backend, sequences, length, dtype, kept, strided, reduce, seed):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(sequences, length, generator=generator) * 3).to(dtype)
    limits = torch.randint(0, length + 1, (sequences, 1), generator=generator)
    mask = {
        "all": torch.ones(sequences, length, dtype=torch.bool),
        "none": torch.zeros(sequences, length, dtype=torch.bool),
        "prefix": torch.arange(length) < limits,
        "random": torch.rand(sequences, length, generator=generator) > 0.4,
    }[kept]
    tokens, cu_seqlens = split(mask, values)
    padded_leaf = poison_masked(values, mask)
    if strided:
        padded_leaf = padded_leaf.T.contiguous().T
        tokens = torch.stack([tokens, tokens], 1)[:, 1]
    upstream = torch.randn(sequences, generator=generator)
    grads = {}
    for name in ("reference", backend):
        leaves = padded_leaf.clone().requires_grad_(), tokens.clone().requires_grad_()
        outputs = (
            mgrpo_kernels.trajectory_entropy(leaves[0], mask=mask, reduce=reduce, backend=name),
            mgrpo_kernels.trajectory_entropy(leaves[1], cu_seqlens=cu_seqlens, reduce=reduce, backend=name),
        )
        sum((output * upstream).sum() for output in outputs).backward()
        grads[name] = outputs, [leaf.grad for leaf in leaves]
    totals = torch.where(mask, values.double(), 0).sum(1)
    oracle = totals if reduce == "sum" else totals / mask.sum(1).clamp_min(1)
    for actual, baseline in zip(grads[backend][0], grads["reference"][0], strict=True):
        assert_within_budget(actual.detach(), oracle, baseline.detach(), reduction_length=max(length, 1))
    for actual, expected in zip(grads[backend][1], grads["reference"][1], strict=True):
        assert actual.dtype == dtype and torch.equal(actual, expected)


@settings(max_examples=60, deadline=None)
@given(**ANYTHING)
def test_any_shape_stride_mask_and_dtype(**drawn):
    check_anything("cpu", **drawn)


@settings(max_examples=20, deadline=None)
@given(**ANYTHING)
def test_any_shape_stride_mask_and_dtype_in_triton(**drawn):
    check_anything("triton", **drawn)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_result_is_written(backend):
    op = partial(mgrpo_kernels.trajectory_entropy, backend=backend)
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        check(op)
        test_gradients(op, "mean")
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_thread_count_changes_no_bit():
    values = torch.rand(7, 50_000, generator=torch.Generator().manual_seed(3))
    mask = torch.rand(7, 50_000, generator=torch.Generator().manual_seed(4)) > 0.1
    tokens, cu_seqlens = split(mask, values)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = values.clone().requires_grad_(), tokens.clone().requires_grad_()
            outputs = (
                mgrpo_kernels.trajectory_entropy(leaves[0], mask=mask, backend="cpu"),
                mgrpo_kernels.trajectory_entropy(leaves[1], cu_seqlens=cu_seqlens, backend="cpu"),
            )
            torch.cat(outputs).square().sum().backward()
            found.append([*outputs, *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_boundaries_outside_the_tokens_are_nan_where_values_are_not_read(backend):
    tokens = torch.ones(8)
    forward, backward = (getattr(torch.ops.mgrpo_kernels, f"trajectory_entropy_{name}") for name in ("fwd", "bwd"))
    for cu_seqlens, bad in (
        ([-1, 3, 8], [True, False]),
        ([0, 9, 9], [True, True]),
        ([0, 5, 3], [False, True]),
        ([1, 3, 7], [False, False]),
    ):
        ends = torch.tensor(cu_seqlens)
        assert forward(tokens, ends, None, True, backend).isnan().tolist() == bad
        grad = backward(torch.ones(2), ends, None, False, [8], torch.float32, backend)
        covered = torch.zeros(8)
        for row, wrong in enumerate(bad):
            if not wrong:
                covered[cu_seqlens[row] : cu_seqlens[row + 1]] = 1
        assert torch.equal(grad, covered)


def test_opcheck_and_meta():
    tokens = make_tokens()
    values, mask = padded(tokens)
    forward, backward = (getattr(torch.ops.mgrpo_kernels, f"trajectory_entropy_{name}") for name in ("fwd", "bwd"))
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(forward, (tokens.to(dtype), CU_SEQLENS, None, True, "cpu"))
        torch.library.opcheck(forward, (values.to(dtype), None, mask, False, "cpu"))
        torch.library.opcheck(backward, (torch.ones(5), CU_SEQLENS, None, True, [23], dtype, "cpu"))
        torch.library.opcheck(backward, (torch.ones(5), None, mask, False, [5, 16], dtype, "cpu"))
    for backend in ("auto", "cpu", "triton"):
        out = mgrpo_kernels.trajectory_entropy(values.to("meta"), mask=mask.to("meta"), backend=backend)
        assert (out.device.type, out.shape, out.dtype) == ("meta", (5,), torch.float32)


# Between two neighbours in bf16: ties, what lies beside them, the ends of the range, and a subnormal.
BETWEEN = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x00018000]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_gradients_are_rounded_to_nearest(dtype, packed, backend):
    upstream = torch.tensor(BETWEEN).to(torch.int32).view(torch.float32)
    shape, mask = ((9,), None) if packed else ((9, 1), torch.ones(9, 1, dtype=torch.bool))
    sequences = (torch.arange(10, dtype=torch.int32) if packed else None, mask, False)
    operation = torch.ops.mgrpo_kernels.trajectory_entropy_bwd
    gradient = operation(upstream, *sequences, shape, dtype, backend).flatten()
    torch.testing.assert_close(gradient, upstream.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(gradient[:3].float(), upstream[:3]), "nothing was rounded"


def test_compiles_whole(trajectory_entropy):
    values, mask = padded(make_tokens())

    def run(packed: Tensor, rectangle: Tensor) -> tuple[Tensor, Tensor]:
        return (
            trajectory_entropy(packed, cu_seqlens=CU_SEQLENS),
            trajectory_entropy(rectangle, mask=mask, reduce="sum"),
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for op in (run, compiled):
        assert not any(output.requires_grad for output in op(make_tokens(), values))
        leaves = make_tokens().requires_grad_(), values.clone().requires_grad_()
        outputs = op(*leaves)
        (outputs[0].square().sum() + outputs[1].square().sum()).backward()
        results.append([*outputs, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("cu_seqlens or mask must be given, and one alone, got neither", {"cu_seqlens": None}),
        ("cu_seqlens or mask must be given, and one alone, got both", {"mask": torch.ones(23, dtype=torch.bool)}),
        (r"reduce must be one of \['mean', 'sum'\], got 'max'", {"reduce": "max"}),
        (r"token_entropy must be of shape \[T\]", {"token_entropy": torch.zeros(2, 3)}),
        (r"token_entropy must be of dtype", {"token_entropy": torch.zeros(23).int()}),
        (r"cu_seqlens must be of dtype int32 or int64", {"cu_seqlens": CU_SEQLENS.float()}),
        (r"cu_seqlens must be of shape \[N\+1\]", {"cu_seqlens": CU_SEQLENS[:0]}),
        ("cu_seqlens must be non-decreasing from 0 to the 23 tokens", {"cu_seqlens": CU_SEQLENS[:-1]}),
        ("cu_seqlens must be non-decreasing from 0", {"cu_seqlens": CU_SEQLENS[1:]}),
        ("cu_seqlens must be non-decreasing", {"cu_seqlens": torch.tensor([0, 9, 4, 23])}),
        (
            r"mask must be of shape \[N, L\]",
            {"token_entropy": torch.zeros(2, 3), "cu_seqlens": None, "mask": torch.ones(2, 2).bool()},
        ),
        (
            r"mask must be of dtype bool",
            {"token_entropy": torch.zeros(2, 3), "cu_seqlens": None, "mask": torch.ones(2, 3)},
        ),
        ("backend must be one of", {"backend": "none"}),
    ],
)
def test_wrong_arguments_are_refused(trajectory_entropy, message, arguments):
    with pytest.raises(ValueError, match=f"^trajectory_entropy: {message}"):
        trajectory_entropy(**({"token_entropy": make_tokens(), "cu_seqlens": CU_SEQLENS} | arguments))
