from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import assert_pass_on
from torch import Tensor

import mgrpo_kernels
from mgrpo_kernels import TokenLogprob
from mgrpo_kernels._common import rows as row_functions
from mgrpo_kernels.testing import (
    assert_gradient_within_budget,
    assert_mutants_rejected,
    assert_within_budget,
    exponent_length,
    peaked_logits,
    poison_masked,
)
from mgrpo_kernels.token_logprob import reference, triton

ROWS, VOCABULARY = 9, 131
NAMES = ("logprob", "entropy", "lse", "self_certainty")


@pytest.fixture(params=["reference", "cpu", "triton"])
def token_logprob(request):
    return partial(mgrpo_kernels.token_logprob, backend=request.param)


BOTH = pytest.mark.parametrize("backend", ["cpu", "triton"])


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = peaked_logits(ROWS, VOCABULARY, dtype=dtype)
    targets = logits.argmax(1)
    targets[::2] = torch.arange(0, VOCABULARY, 29)[: len(targets[::2])]
    targets[-1] = VOCABULARY - 1
    mask = torch.tensor([True, True, False, True, True, True, False, True, True])
    return poison_masked(logits, mask), targets, mask, torch.linspace(0.5, 1.7, ROWS)


def independent(
    logits: Tensor, targets: Tensor, mask: Tensor, temperature: float | Tensor, softcap: float | None = None
) -> TokenLogprob:
    """The definitions, by log_softmax and plain autograd, in the dtype of the logits."""
    scale = temperature.to(logits.dtype)[:, None] if isinstance(temperature, Tensor) else temperature
    z = torch.where(mask[:, None], logits, 0)
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / scale
    logp = z.log_softmax(1)
    outputs = (
        logp.gather(1, targets[:, None]).squeeze(1),
        -(logp.exp() * logp).sum(1),
        z.logsumexp(1),
        z.logsumexp(1) - z.mean(1),
    )
    return TokenLogprob(*(torch.where(mask, output, 0) for output in outputs))


def with_gradient(op, logits: Tensor, upstream: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    leaf = logits.clone().requires_grad_()
    outputs = op(leaf)
    total = sum((output * weight.to(output.dtype)).sum() for output, weight in zip(outputs, upstream, strict=True))
    if not total.requires_grad:
        return list(outputs), torch.zeros_like(leaf)
    total.backward()
    return [output.detach() for output in outputs], leaf.grad


def check(op, *, dtype: torch.dtype = torch.float32, softcap: float | None = None) -> None:
    logits, targets, mask, temperature = make_inputs(dtype)
    upstream = [torch.randn(ROWS, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

    def run(leaf: Tensor):
        return op(leaf, targets, temperature=temperature, mask=mask, softcap=softcap, self_certainty=True)

    outputs, gradient = with_gradient(run, logits, upstream)
    expected, baseline = (
        with_gradient(
            lambda leaf, to=to: independent(leaf.to(to), targets, mask, temperature, softcap), logits.double(), upstream
        )
        for to in (torch.float64, torch.float32)
    )
    for name, actual, oracle, rounded in zip(NAMES, outputs, expected[0], baseline[0], strict=True):
        assert actual.dtype == torch.float32
        assert_within_budget(actual, oracle, rounded, reduction_length=VOCABULARY, what=name)
    assert gradient.dtype == dtype
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))
    assert_gradient_within_budget(gradient, expected[1], baseline[1].to(dtype), targets, reduction_length=VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_outputs_and_gradient_match_fp64(token_logprob, dtype, softcap):
    check(token_logprob, dtype=dtype, softcap=softcap)


def test_every_mutant_is_rejected(token_logprob):
    def without_last_columns(op):
        def mutated(logits, *args, **kwargs):
            keep = torch.arange(logits.shape[1]) < logits.shape[1] - 3
            return op(logits.masked_fill(~keep, -torch.inf), *args, **kwargs)

        return mutated

    assert_mutants_rejected(token_logprob, check, extra={"last_columns_skipped": without_last_columns})


def test_blocks_of_rows_of_the_reference_agree_with_one_block(monkeypatch):
    token_logprob = partial(mgrpo_kernels.token_logprob, backend="reference")
    logits, targets, mask, _ = make_inputs()
    whole = token_logprob(logits, targets, mask=mask)
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 2 * VOCABULARY)
    blocks = token_logprob(logits, targets, mask=mask)
    for one, other in zip(whole[:3], blocks[:3], strict=True):
        assert torch.equal(one, other)
    check(token_logprob)


def test_gradcheck_of_all_outputs():
    token_logprob = partial(mgrpo_kernels.token_logprob, backend="reference")
    logits = peaked_logits(4, 6, dtype=torch.float64, boosted=1).mul_(0.4)
    logits[0, 2] = -torch.inf
    targets = torch.tensor([0, 5, -100, 3])
    temperature = torch.tensor([0.7, 1.0, 1.3, 2.0], dtype=torch.float64)

    def run(leaf: Tensor, softcap: float | None) -> tuple[Tensor, ...]:
        full = torch.cat([leaf[:, :2], torch.where(torch.isinf(logits[:, 2:]), logits[:, 2:], leaf[:, 2:])], 1)
        return tuple(token_logprob(full, targets, temperature=temperature, softcap=softcap, self_certainty=True))

    leaf = logits.nan_to_num(neginf=0.0).requires_grad_()
    for softcap in (None, 3.0):
        assert torch.autograd.gradcheck(lambda x, cap=softcap: run(x, cap), leaf)


def test_minus_infinite_logits(token_logprob):
    logits = torch.tensor([[1.0, -torch.inf, 3.0], [0.5, -torch.inf, -torch.inf]], requires_grad=True)
    out = token_logprob(logits, torch.tensor([2, 1]), self_certainty=True)
    finite = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(out.logprob[0], finite.log_softmax(0)[1])
    assert out.logprob[1] == -torch.inf
    torch.testing.assert_close(
        out.entropy, torch.stack([torch.distributions.Categorical(logits=finite).entropy(), torch.tensor(0.0)])
    )
    torch.testing.assert_close(out.self_certainty[0], finite.logsumexp(0) - 2.0)
    (out.logprob.nan_to_num(neginf=0.0) + 3 * out.entropy + 2 * out.self_certainty).sum().backward()
    assert logits.grad.isfinite().all()
    assert torch.equal(logits.grad[:, 1], torch.zeros(2))
    only = logits.detach().requires_grad_()
    token_logprob(only, torch.tensor([2, 1])).logprob[1].backward()
    assert torch.equal(only.grad, torch.zeros_like(only))


def test_target_whose_probability_underflows_keeps_its_gradient(token_logprob):
    logits = torch.tensor([[0.0, -500.0]], requires_grad=True)
    token_logprob(logits, torch.tensor([1])).logprob.backward()
    assert torch.equal(logits.grad, torch.tensor([[-1.0, 1.0]]))


def test_entropy_does_not_cancel_for_large_logits(token_logprob):
    logits = peaked_logits(4, 64) + 3000.0
    exact = torch.distributions.Categorical(logits=logits.double()).entropy()
    torch.testing.assert_close(
        token_logprob(logits, torch.zeros(4, dtype=torch.int64)).entropy.double(), exact, rtol=1e-5, atol=1e-7
    )


def test_bf16_logits_are_not_rounded_by_the_temperature(token_logprob):
    logits = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.bfloat16)
    out = token_logprob(logits, torch.tensor([0]), temperature=1.1)
    torch.testing.assert_close(out.logprob, (logits.float() / 1.1).log_softmax(1)[:, 0], rtol=1e-6, atol=1e-6)


def test_inplace_backward_writes_over_the_logits_and_bumps_their_version(token_logprob):
    logits, targets, mask, temperature = make_inputs()
    plain, inplace = (logits.clone().requires_grad_() for _ in range(2))
    token_logprob(plain, targets, temperature=temperature, mask=mask).entropy.sum().backward()
    version = inplace._version
    out = token_logprob(inplace, targets, temperature=temperature, mask=mask, inplace_backward=True)
    out.entropy.sum().backward(retain_graph=True)
    assert torch.equal(inplace.detach(), plain.grad)
    assert torch.equal(inplace.grad, plain.grad)
    assert inplace._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.entropy.sum().backward()


def test_strided_rows_no_rows_and_one_row(token_logprob):
    storage = peaked_logits(4, 20)
    targets = torch.tensor([0, 1, 2, 3])
    strided = token_logprob(storage[:, :13], targets)
    assert torch.equal(strided.logprob, token_logprob(storage[:, :13].clone(), targets).logprob)
    one = token_logprob(storage[3:, :13], targets[3:])
    assert torch.equal(one.entropy, strided.entropy[3:])
    empty = torch.zeros(0, 7, requires_grad=True)
    out = token_logprob(empty, torch.zeros(0, dtype=torch.int64))
    out.logprob.sum().backward()
    assert out.lse.shape == (0,) and empty.grad.shape == (0, 7)
    assert token_logprob(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)).entropy.tolist() == [0.0, 0.0]


def test_ignored_targets_equal_a_mask(token_logprob):
    logits, targets, mask, _ = make_inputs()
    by_mask = token_logprob(logits, targets, mask=mask)
    by_target = token_logprob(logits, targets.masked_fill(~mask, -100))
    for one, other in zip(by_mask[:3], by_target[:3], strict=True):
        assert torch.equal(one, other)


def batch_of_one_shape(rows: int, vocabulary: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    logits = peaked_logits(rows, vocabulary, dtype=dtype, boosted=min(3, vocabulary), seed=seed)
    return logits, torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))


def assert_near_the_definition(logits: Tensor, targets: Tensor, *, inplace: bool = False, backend: str = "cpu") -> None:
    """Outputs and gradient of the compiled kernel against the definition in fp64, with fp32's own error as a budget."""
    rows, vocabulary = logits.shape
    mask = torch.ones(rows, dtype=torch.bool)
    upstream = [torch.randn(rows, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

    def native(leaf: Tensor):
        scaled = leaf * 1 if inplace else leaf  # the leaf itself must stay readable
        return mgrpo_kernels.token_logprob(
            scaled, targets, self_certainty=True, inplace_backward=inplace, temperature=1.3, backend=backend
        )

    outputs, gradient = with_gradient(native, logits, upstream)
    expected, baseline = (
        with_gradient(lambda leaf, to=to: independent(leaf.to(to), targets, mask, 1.3), logits.double(), upstream)
        for to in (torch.float64, torch.float32)
    )
    # Outputs are differences of logits, a gradient of upstream gradients: both may cancel in a small vocabulary.
    sizes = {"reduction_length": vocabulary, "largest_term": float(logits.abs().max()) / 1.3}
    for name, actual, oracle, rounded in zip(NAMES, outputs, expected[0], baseline[0], strict=True):
        assert_within_budget(actual, oracle, rounded, what=name, **sizes)
    rounded = baseline[1].to(logits.dtype)
    sizes["largest_term"] = float(sum(each.abs() for each in upstream).max())
    sizes["reduction_length"] += exponent_length(logits, 1.3)
    assert_gradient_within_budget(gradient, expected[1], rounded, targets, **sizes)


@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 17, 64, 1023, 1024, 1025, 32256, 151936, 152064])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vocabularies_of_every_remainder(vocabulary, dtype):
    assert_near_the_definition(*batch_of_one_shape(3, vocabulary, dtype, seed=vocabulary))


# 32768 columns are one program of the forward, 16384 of the backward, 4096 a block of either.
@pytest.mark.parametrize("vocabulary", [1, 16, 4095, 4096, 4104, 16385, 32776, 70001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vocabularies_of_several_blocks_and_programs(vocabulary, dtype):
    assert_near_the_definition(*batch_of_one_shape(2, vocabulary, dtype, seed=vocabulary), backend="triton")


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocabulary=st.integers(1, 5000),
    padding=st.integers(0, 16),
    offset=st.integers(0, 16),
    inplace=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_stride_offset_and_dtype_by_triton(rows, vocabulary, padding, offset, inplace, dtype, seed):
    logits, targets = batch_of_one_shape(rows, vocabulary, dtype, seed)
    stride = vocabulary + padding
    storage = torch.full((offset + rows * stride + vocabulary,), torch.nan, dtype=dtype)
    strided = storage.as_strided((rows, vocabulary), (stride, 1), offset)
    strided.copy_(logits)
    assert_near_the_definition(strided, targets, inplace=inplace, backend="triton")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 5),
    vocabulary=st.integers(1, 70),
    padding=st.integers(0, 9),
    offset=st.integers(0, 5),
    inplace=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_stride_offset_and_dtype(rows, vocabulary, padding, offset, inplace, dtype, seed):
    logits, targets = batch_of_one_shape(rows, vocabulary, dtype, seed)
    stride = vocabulary + padding
    storage = torch.full((offset + rows * stride + vocabulary,), torch.nan, dtype=dtype)
    strided = storage.as_strided((rows, vocabulary), (stride, 1), offset)
    strided.copy_(logits)
    if rows:
        assert_near_the_definition(strided, targets, inplace=inplace)
    else:
        assert mgrpo_kernels.token_logprob(strided, targets, backend="cpu").logprob.shape == (0,)


@pytest.mark.parametrize("spacing", [2**31 + 17])
def test_rows_beyond_2_31_elements(spacing):
    logits, targets = batch_of_one_shape(2, 100, torch.bfloat16, seed=1)
    # Untouched pages of the storage take no memory.
    far = torch.empty(spacing + 100, dtype=torch.bfloat16).as_strided((2, 100), (spacing, 1))
    far.copy_(logits)
    leaf, near = far.requires_grad_(), logits.clone().requires_grad_()
    sums = []
    for tensor in (leaf, near):
        out = mgrpo_kernels.token_logprob(tensor, targets, backend="cpu", inplace_backward=tensor is leaf)
        (out.logprob + 2 * out.entropy).sum().backward()
        sums.append(torch.stack(out[:3]).detach())
    assert torch.equal(*sums)
    assert torch.equal(leaf.detach(), near.grad)


def test_the_thread_count_changes_no_bit():
    logits, targets = batch_of_one_shape(7, 3000, torch.bfloat16, seed=2)
    results = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        leaf = logits.clone().requires_grad_()
        out = mgrpo_kernels.token_logprob(leaf, targets, backend="cpu")
        (out.logprob + out.entropy).sum().backward()
        torch.set_num_threads(before)
        results.append((*out[:3], leaf.grad))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@BOTH
def test_a_row_has_the_same_bits_in_any_batch(backend):
    logits, targets = batch_of_one_shape(6, 777, torch.float32, seed=3)
    whole = mgrpo_kernels.token_logprob(logits, targets, backend=backend)
    for row in range(6):
        alone = mgrpo_kernels.token_logprob(logits[row : row + 1], targets[row : row + 1], backend=backend)
        assert all(torch.equal(one[row : row + 1], two) for one, two in zip(whole[:3], alone[:3], strict=True))


@pytest.mark.parametrize("vocabulary", [40, 40_000])
def test_rows_out_of_range_are_nan_and_masked_rows_are_not_read_by_triton(vocabulary):
    logits, targets = batch_of_one_shape(5, vocabulary, torch.float32, seed=6)
    targets[1], targets[2], targets[4] = vocabulary, -100, -1
    logits[2] = torch.nan
    temperatures = torch.tensor([1.0, 1.0, torch.nan, 0.0, 1.0])
    rows = (targets, None, 1.0, temperatures, 0.0)
    outputs = torch.ops.mgrpo_kernels.token_logprob_fwd(logits, *rows, True, "triton")
    for output in outputs[:4]:
        assert output.isnan().tolist() == [False, True, False, True, True] and output[2] == 0
    values = (*outputs[:3], outputs[4], torch.ones(5), None, torch.ones(5), None, "triton")
    gradient = torch.ops.mgrpo_kernels.token_logprob_bwd(logits, *rows, *values)
    assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == [False, True, False, True, True]
    assert torch.equal(gradient[2], torch.zeros(vocabulary))


@pytest.mark.parametrize("vocabulary", [50, 40_000])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_sums_and_coefficients_of_triton_are_those_of_the_formulas(vocabulary, softcap):
    logits, targets = batch_of_one_shape(4, vocabulary, torch.float32, seed=7)
    logits[0, 3], targets[1], targets[2] = -torch.inf, vocabulary + 5, -100
    temperatures = torch.tensor([0.8, 1.0, 1.3, 2.0])
    sums = triton.row_sums(logits, targets, 1.0, temperatures, softcap, True)
    exact, rounded = (
        row_functions.scale_logits(logits.to(to), temperatures.to(to), softcap or None)
        for to in (torch.float64, torch.float32)
    )
    held = (targets >= 0) & (targets < vocabulary)
    columns = torch.where(held, targets, 0)[:, None]
    expected, baseline = (
        (*reference.row_sums(z, True), torch.where(held, z.gather(1, columns)[:, 0], 0)) for z in (exact, rounded)
    )
    length = {"reduction_length": vocabulary + exponent_length(logits, 0.8)}
    for actual, oracle, other in zip(sums, expected, baseline, strict=True):
        assert_within_budget(actual, oracle, other, largest_term=float(exact.nan_to_num(0, 0, 0).abs().max()), **length)
    coefficients = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    gradients = []
    for z in (exact, rounded):
        given = row_functions.RowGrads(*(each.to(z.dtype) for each in coefficients))
        outside = torch.where(held, targets, -1)
        gradients.append(
            row_functions.dlogits_from_scaled(
                z.clone(), z.logsumexp(1), outside, given, temperatures.to(z.dtype), softcap or None
            )
        )
    dlogits = torch.full_like(logits, torch.nan)
    lse = exact.logsumexp(1).float()
    given = row_functions.RowGrads(*coefficients)
    triton.row_gradient(logits, dlogits, targets, 1.0, temperatures, softcap, lse, given)
    largest = float(sum(each.abs() for each in coefficients).max()) / 0.8
    assert_gradient_within_budget(
        dlogits, *gradients, torch.where(held, targets, 0), largest_term=largest * float(lse.abs().max()), **length
    )


@pytest.mark.parametrize("vocabulary", [50, 4100])
def test_the_gradient_that_triton_stores_in_bf16_is_that_in_fp32_rounded_to_nearest(vocabulary):
    logits, targets = batch_of_one_shape(4, vocabulary, torch.float32, seed=8)
    logits[0, 3], targets[1] = -torch.inf, vocabulary + 5
    coefficients = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    stored = [torch.full_like(logits, torch.nan, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    for dlogits in stored:
        given = (targets, 0.9, None, 0.0, (logits / 0.9).logsumexp(1), row_functions.RowGrads(*coefficients))
        triton.row_gradient(logits, dlogits, *given)
    assert torch.equal(stored[1], stored[0].bfloat16())
    truncated = (stored[0].view(torch.int32) & -(2**16)).view(torch.float32)
    assert not torch.equal(stored[1].float(), truncated)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_nan_and_no_other(token_logprob, value):
    logits, targets = batch_of_one_shape(3, 40, torch.float32, seed=4)
    logits[1, 20] = value
    leaf = logits.requires_grad_()
    out = token_logprob(leaf, targets)
    out.entropy.sum().backward()
    for output in out[:3]:
        assert output.isnan().tolist()[::2] == [False, False]
    assert out.logprob[1].isnan() and out.entropy[1].isnan()
    assert leaf.grad.isnan().any(1).tolist() == [False, True, False]


def test_a_row_of_minus_infinity_is_nan_in_every_backend():
    logits = torch.full((1, 20), -torch.inf)
    outs = [
        mgrpo_kernels.token_logprob(logits, torch.tensor([3]), self_certainty=True, backend=backend)
        for backend in ("reference", "cpu", "triton")
    ]
    torch.testing.assert_close(outs[1], outs[0], equal_nan=True)
    torch.testing.assert_close(outs[2], outs[0], equal_nan=True)
    lowest = torch.full((1, 20), torch.finfo(torch.float32).min)
    for backend in ("cpu", "triton"):
        assert mgrpo_kernels.token_logprob(lowest, torch.tensor([3]), backend=backend).entropy.item() > 2.99


@BOTH
def test_a_row_without_upstream_gradient_is_not_read_again(backend):
    logits, targets = batch_of_one_shape(4, 50, torch.float32, seed=5)
    leaf = logits.requires_grad_()
    out = mgrpo_kernels.token_logprob(leaf, targets, backend=backend)
    with torch.no_grad():
        leaf.data[2] = torch.nan
    out.logprob.backward(torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert torch.equal(leaf.grad[2], torch.zeros(50)) and leaf.grad[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_meets_the_budget(isa):
    assert_pass_on(isa, __file__, "(match_fp64 or remainder) and not reference")


def test_opcheck_and_meta():
    logits, targets, mask, temperature = make_inputs()
    logits, rows = logits.nan_to_num(), (targets, mask, 1.0, temperature, 6.0)
    forward = torch.ops.mgrpo_kernels.token_logprob_fwd
    for self_certainty in (False, True):
        torch.library.opcheck(forward, (logits, *rows, self_certainty, "cpu"))
    outputs = forward(logits, *rows, True, "cpu")
    values = (*outputs[:3], outputs[4], torch.ones(ROWS), torch.ones(ROWS), None, None, "cpu")
    torch.library.opcheck(torch.ops.mgrpo_kernels.token_logprob_bwd, (logits, *rows, *values))
    torch.library.opcheck(torch.ops.mgrpo_kernels.token_logprob_bwd_, (logits.clone(), *rows, *values))
    for backend in ("auto", "cpu"):
        out = mgrpo_kernels.token_logprob(logits.to("meta"), targets.to("meta"), self_certainty=True, backend=backend)
        assert [output.device.type for output in out] == ["meta"] * 4
        assert [output.shape for output in out] == [(ROWS,)] * 4


@pytest.mark.slow
def test_compiles_whole(token_logprob):
    logits, targets, mask, temperature = make_inputs()

    def run(leaf: Tensor) -> tuple[Tensor, ...]:
        return token_logprob(leaf, targets, temperature=temperature, mask=mask)[:3]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    upstream = [torch.randn(ROWS) for _ in range(3)]
    eager, traced = (with_gradient(op, logits, upstream) for op in (run, compiled))
    for one, other in zip([*eager[0], eager[1]], [*traced[0], traced[1]], strict=True):
        torch.testing.assert_close(one, other)


LOGITS, TARGETS = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"logits must be a tensor \[T, V\], got list", {"logits": [1.0]}),
        (r"logits must be of shape \[T, V\]", {"logits": torch.zeros(3)}),
        (r"logits must be of dtype", {"logits": torch.zeros(3, 5, dtype=torch.int64)}),
        (r"V >= 1", {"logits": torch.zeros(3, 0)}),
        (r"unit stride along V", {"logits": torch.zeros(5, 3).T}),
        (r"overlapping rows", {"logits": torch.zeros(1, 5).expand(3, 5), "inplace_backward": True}),
        (r"targets must be of shape \[T\] = \[3\]", {"targets": TARGETS[:2]}),
        (r"targets must be of dtype int64", {"targets": TARGETS.int()}),
        (r"targets must be in \[0, 5\) or -100, got 5", {"targets": torch.tensor([0, 5, 0])}),
        (r"targets must be in \[0, 5\) or -100, got -1", {"targets": torch.tensor([0, -1, 0])}),
        (r"targets must be on cpu", {"targets": TARGETS.to("meta")}),
        (r"mask must be of dtype bool", {"mask": TARGETS}),
        (r"softcap must be a finite number in \(0", {"softcap": 0.0}),
        (r"temperature must be a finite number in \(0", {"temperature": 0.0}),
        (r"temperature must be a finite number", {"temperature": float("nan")}),
        (r"temperature must be of shape \[T\]", {"temperature": torch.tensor(1.0)}),
        (r"temperature must be finite and > 0, got nan", {"temperature": torch.tensor([1.0, torch.nan, 1.0])}),
        (r"temperature must be finite and > 0, got -1", {"temperature": torch.tensor([1.0, 1.0, -1.0])}),
        (r"backend must be one of \['auto', 'reference'.*\], got 'fast'", {"backend": "fast"}),
    ],
)
def test_wrong_arguments_are_refused(token_logprob, message, arguments):
    with pytest.raises(ValueError, match=f"^token_logprob: .*{message}"):
        token_logprob(**({"logits": LOGITS, "targets": TARGETS} | arguments))


def test_out_of_range_rows_are_nan_where_values_are_not_read():
    options = {"mask": None, "softcap": None, "self_certainty": False, "inplace_backward": False}
    out = reference.token_logprob(LOGITS, torch.tensor([0, 5, 0]), temperature=torch.tensor([1.0, 1.0, 0.0]), **options)
    assert out.logprob.isnan().tolist() == [False, True, True]
