from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import assert_pass_on
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mgrpo_kernels
from mgrpo_kernels.testing import (
    assert_gradient_within_budget,
    assert_mutants_rejected,
    assert_within_budget,
    exponent_length,
    peaked_logits,
    poison_masked,
)

LENGTHS = [4, 0, 6, 1, 9]
CU_SEQLENS = torch.tensor([0, 4, 4, 10, 11, 20], dtype=torch.int32)
TOKENS, HIDDEN, VOCABULARY = 20, 8, 41
ADVANTAGE = torch.tensor([1.2, 0.7, -0.8, 0.0, -1.5])
FULL = {"dual_clip": 1.5, "kl_coef": 0.1, "entropy_coef": 0.05, "tis_cap": 1.3, "clip_high": 0.28}
NEEDS = {"cu_seqlens": CU_SEQLENS, "advantage": ADVANTAGE}


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request):
    return request.param


@pytest.fixture
def logits_grpo_loss(backend):
    return partial(mgrpo_kernels.logits_grpo_loss, backend=backend)


@pytest.fixture(params=["reference", "cpu", "triton"])
def linear_grpo_loss(request):
    return partial(mgrpo_kernels.linear_grpo_loss, backend=request.param)


def rows(dtype: torch.dtype = torch.float32, tokens: int = TOKENS, seed: int = 0) -> dict[str, Tensor]:
    """Arguments for logits_grpo_loss, near which the other log-probs lie; masked rows hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    logits = peaked_logits(tokens, VOCABULARY, dtype=dtype, seed=seed)
    targets = torch.where(torch.arange(tokens) % 3 == 0, 7, logits.argmax(1))
    mask = torch.rand(tokens, generator=generator) > 0.2
    picked = mgrpo_kernels.token_logprob(logits.double(), targets, temperature=0.8, backend="reference").logprob.float()
    others = {
        name: poison_masked(picked + 0.3 * torch.randn(tokens, generator=generator), mask)
        for name in ("old_logprob", "ref_logprob", "rollout_logprob")
    }
    return {"logits": poison_masked(logits, mask), "targets": targets, "mask": mask, **others}


def check(op) -> None:
    """Against the definition by log_softmax and plain autograd, of the fields that it uses."""
    inputs = rows()
    logits, targets, mask, old = (inputs[name] for name in ("logits", "targets", "mask", "old_logprob"))
    leaf = logits.clone().requires_grad_()
    out = op(leaf, targets, mask=mask, temperature=0.8, old_logprob=old, entropy_coef=0.1, **NEEDS)
    expected = []
    for to in (torch.float64, torch.float32):
        twin = logits.nan_to_num().to(to).requires_grad_()
        logp = (twin / 0.8).log_softmax(1)
        picked, entropy = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1)
        ratio = (picked - old.nan_to_num().to(to)).exp()
        weight = ADVANTAGE.to(to).repeat_interleave(torch.tensor(LENGTHS))
        loss = -torch.minimum(ratio * weight, ratio.clamp(0.8, 1.2) * weight) - 0.1 * entropy
        loss = loss[mask].mean()
        loss.backward()
        expected.append((loss.detach(), twin.grad, entropy.detach()[mask].mean()))
    oracle, rounded = expected
    assert_within_budget(out.loss.detach(), oracle[0], rounded[0], reduction_length=TOKENS)
    assert_within_budget(out.metrics["entropy"], oracle[2], rounded[2], reduction_length=TOKENS + VOCABULARY)
    assert out.loss.requires_grad
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))
    assert_gradient_within_budget(gradient, oracle[1], rounded[1], targets, reduction_length=VOCABULARY)


def test_logits_loss_matches_plain_autograd_and_rejects_every_mutant(logits_grpo_loss):
    assert_mutants_rejected(logits_grpo_loss, check, without=("shifted_row", "last_tile_skipped"))


def test_linear_loss_rejects_every_mutant(linear_grpo_loss):
    def from_logits(logits: Tensor, *args, **kwargs):
        return linear_grpo_loss(logits, torch.eye(logits.shape[1]), *args, **kwargs)

    assert_mutants_rejected(from_logits, check, without=("shifted_row", "last_tile_skipped"))


def run(inputs: dict, backend: str, to: torch.dtype | None = None, **options) -> dict[str, Tensor]:
    """Loss, metrics and the gradient of the logits."""
    leaf = inputs["logits"].detach().to(to or inputs["logits"].dtype).requires_grad_()
    upstream = options.pop("upstream", 1.0)
    out = mgrpo_kernels.logits_grpo_loss(**(NEEDS | inputs | {"logits": leaf}), **options, backend=backend)
    out.loss.backward(torch.tensor(upstream, dtype=out.loss.dtype))
    return {"loss": out.loss.detach(), **out.metrics, "dlogits": leaf.grad}


def assert_near_fp64(backend: str, inputs: dict, **options) -> None:
    """A compiled backend against the reference in fp64, with fp32's own error as a budget."""
    oracle, rounded = (run(inputs, "reference", to, **options) for to in (torch.float64, torch.float32))
    actual, targets = run(inputs, backend, **options), inputs["targets"]
    tokens, vocabulary = inputs["logits"].shape
    scalars = [
        torch.stack([value.to(results["loss"].dtype) for name, value in results.items() if name != "dlogits"])
        for results in (actual, oracle, rounded)
    ]
    # Beside the sums, a token's own terms are rounded a dozen times, and both its ratio and a probability are e^x.
    length = tokens + vocabulary + 12 + 2 * exponent_length(inputs["logits"], 0.7)
    # As one vector, whose largest entry sets the rounding: terms of both signs cancel in some.
    assert_within_budget(*scalars, reduction_length=length, what="loss and metrics")
    assert actual["dlogits"].dtype == inputs["logits"].dtype
    gradients = (actual["dlogits"], oracle["dlogits"], rounded["dlogits"].to(actual["dlogits"].dtype))
    assert_gradient_within_budget(*gradients, targets, reduction_length=length)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("reduce", ["token_mean", "sequence_mean_token_mean", "constant"])
def test_every_term_together(backend, dtype, ratio, reduce):
    inputs = rows(dtype)
    inputs["targets"][inputs["mask"].nonzero()[0]] = -100
    options = FULL | {"ratio": ratio, "reduce": reduce, "max_length": 12}
    assert_near_fp64(backend, inputs, temperature=torch.linspace(0.7, 1.4, TOKENS), **options)


ANYTHING = {
    "tokens": st.integers(1, 9),
    "padding": st.integers(0, 9),
    "offset": st.integers(0, 5),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "kl": st.sampled_from(["k1", "k2", "k3"]),
    "by_token": st.booleans(),
    "upstream": st.sampled_from([1.0, -0.25]),
    "seed": st.integers(0, 2**16),
}


def check_anything(backend, tokens, padding, offset, dtype, kl, by_token, upstream, seed):
    inputs = rows(dtype, tokens, seed)
    stride = VOCABULARY + padding
    storage = torch.full((offset + tokens * stride + VOCABULARY,), torch.nan, dtype=dtype)
    strided = storage.as_strided((tokens, VOCABULARY), (stride, 1), offset)
    inputs["logits"] = strided.copy_(inputs["logits"])
    shared = {"cu_seqlens": torch.tensor([0, tokens // 2, tokens])}
    shared["advantage"] = torch.linspace(-1.3, 1.1, tokens if by_token else 2)
    assert_near_fp64(backend, inputs | shared, **(FULL | {"kl": kl, "upstream": upstream}), temperature=0.8)


@settings(max_examples=60, deadline=None)
@given(**ANYTHING)
def test_any_stride_offset_dtype_and_option(**drawn):
    check_anything("cpu", **drawn)


@settings(max_examples=10, deadline=None)
@given(**ANYTHING)
def test_any_stride_offset_dtype_and_option_in_triton(**drawn):
    check_anything("triton", **drawn)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.05])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_compositions_equal_their_parts(backend, entropy_coef, ratio):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    targets = (hidden @ weight.T).argmax(1)
    mask = rows()["mask"]
    targets[mask.nonzero()[0]] = -100
    temperature = torch.linspace(0.7, 1.4, TOKENS)
    near = (hidden @ weight.T / temperature[:, None]).log_softmax(1).gather(1, targets.clamp_min(0)[:, None])[:, 0]
    options = {"old_logprob": near - 0.1, "ref_logprob": near + 0.2, "kl_coef": 0.2, "ratio": ratio}
    options |= {"cu_seqlens": CU_SEQLENS, "entropy_coef": entropy_coef, "clip_low": 0.1}
    shared = {"temperature": temperature, "backend": backend}

    def of(kind: str, to: torch.dtype, **shared) -> dict[str, Tensor]:
        x, w = poison_masked(hidden, mask).to(to).requires_grad_(), weight.to(to).requires_grad_()
        args = (targets, ADVANTAGE, mask)
        if kind == "linear":
            out = mgrpo_kernels.linear_grpo_loss(x, w, *args, budget_bytes=2000, **shared, **options)
        elif kind == "logits":
            logits = torch.where(mask[:, None], x, 0) @ w.T
            out = mgrpo_kernels.logits_grpo_loss(logits, *args, **shared, **options)
        else:
            parts = mgrpo_kernels.linear_token_logprob(x, w, targets, mask=mask, **shared)
            keep, last = mask & (targets != -100), {"backend": shared["backend"]}
            out = mgrpo_kernels.grpo_loss(parts.logprob, ADVANTAGE, keep, entropy=parts.entropy, **last, **options)
        out.loss.backward()
        return {"loss": out.loss.detach(), **out.metrics, "dhidden": x.grad, "dweight": w.grad}

    oracle, rounded = (
        of("parts", to, temperature=temperature, backend="reference") for to in (torch.float64, torch.float32)
    )
    assert oracle["entropy"] > 0
    for kind in ("linear", "logits", "parts"):
        for name, value in of(kind, torch.float32, **shared).items():
            length = TOKENS + VOCABULARY * HIDDEN
            want = oracle[name].double()
            assert_within_budget(value, want, rounded[name], reduction_length=length, what=f"{kind}: {name}")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_second_backward_is_right_though_the_first_wrote_over_its_gradient(backend):
    inputs = rows()
    leaf = inputs.pop("logits").requires_grad_()
    logits = leaf * 1
    loss = mgrpo_kernels.logits_grpo_loss(logits, **inputs, **NEEDS, **FULL, backend=backend).loss
    first = torch.autograd.grad(loss, logits, torch.tensor(0.5), retain_graph=True)[0]
    kept = first.clone()
    first.fill_(torch.nan)
    second = torch.autograd.grad(loss, logits, torch.tensor(-2.0), retain_graph=True)[0]
    third = torch.autograd.grad(loss, leaf)[0]
    assert kept.abs().sum() > 0
    torch.testing.assert_close(second, -4 * kept)
    torch.testing.assert_close(third, 2 * kept)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_logits_may_be_written_over_once_the_loss_is_there(backend):
    inputs = rows()
    expected = run(inputs, backend, **FULL)["dlogits"]
    leaf = inputs.pop("logits").requires_grad_()
    logits = leaf * 1
    loss = mgrpo_kernels.logits_grpo_loss(logits, **inputs, **NEEDS, **FULL, backend=backend).loss
    logits.detach().zero_()
    assert torch.equal(torch.autograd.grad(loss, logits, retain_graph=True)[0], expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_bf16_gradients_are_those_of_upstream_1_times_the_upstream(backend):
    inputs = rows(torch.bfloat16)
    one, other = (run(inputs, backend, **FULL, upstream=upstream)["dlogits"] for upstream in (1.0, 0.37))
    assert torch.equal(other, (one.float() * 0.37).bfloat16()) and one.abs().sum() > 0


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_fp16_gradients_do_not_underflow_ahead_of_the_loss_scale(backend):
    assert_near_fp64(backend, rows(torch.float16), normalizer=1e6, upstream=65536.0)


class _LargeResults(TorchDispatchMode):
    """Storages of at least `least` bytes that operations return."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.kept, self.found = least, [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= self.least:
                self.kept.append(tensor)
                self.found.add(tensor.data_ptr())
        return result


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(("grad", "upstream", "count"), [(False, 1.0, 0), (True, 1.0, 1), (True, 3.0, 1)])
def test_the_gradient_is_the_only_tensor_of_the_size_of_the_logits(backend, grad, upstream, count):
    inputs = rows(tokens=TOKENS)
    logits = inputs.pop("logits").requires_grad_(grad)
    with _LargeResults(logits.nbytes) as large:
        loss = mgrpo_kernels.logits_grpo_loss(logits, **inputs, **NEEDS, backend=backend).loss
        if grad:
            torch.autograd.grad(loss, logits, torch.tensor(upstream))
    assert loss.requires_grad == grad
    assert len(large.found - {logits.data_ptr()}) == count


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_nothing_is_computed_for_no_gradient(backend):
    inputs = rows()
    leaf = inputs.pop("logits").requires_grad_()
    with torch.no_grad(), _LargeResults(leaf.nbytes) as large:
        loss = mgrpo_kernels.logits_grpo_loss(leaf, **inputs, **NEEDS, backend=backend).loss
    assert not loss.requires_grad and not large.found - {leaf.data_ptr()}
    constants = {name: inputs[name].nan_to_num().requires_grad_() for name in ("old_logprob", "ref_logprob")}
    arguments = NEEDS | inputs | constants
    assert not mgrpo_kernels.logits_grpo_loss(leaf.detach(), **arguments, backend=backend).loss.requires_grad


def test_the_thread_count_changes_no_bit():
    inputs = rows(torch.bfloat16)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(inputs, "cpu", **FULL))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_output_element_is_written(backend):
    inputs = rows()
    expected = run(inputs, backend, **FULL)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        poisoned = run(inputs, backend, **FULL)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(poisoned[name], value) and value.isfinite().all() for name, value in expected.items())


def test_no_rows_and_masked_rows(logits_grpo_loss):
    empty = torch.zeros(0, 5, requires_grad=True)
    arguments = {"advantage": torch.zeros(0), "mask": torch.zeros(0).bool(), "cu_seqlens": torch.tensor([0])}
    loss = logits_grpo_loss(empty, torch.zeros(0, dtype=torch.int64), **arguments).loss
    loss.backward()
    assert loss.item() == 0 and empty.grad.shape == (0, 5)
    inputs = rows() | {"mask": torch.zeros(TOKENS, dtype=torch.bool), "logits": torch.full((TOKENS, 5), torch.nan)}
    leaf = inputs.pop("logits").requires_grad_()
    out = logits_grpo_loss(leaf, **inputs, **NEEDS)
    out.loss.backward()
    assert out.loss.item() == 0 and torch.equal(leaf.grad, torch.zeros(TOKENS, 5))


def test_a_row_that_is_not_finite_is_nan_and_no_other():
    inputs = rows()
    inputs |= {"mask": torch.ones(TOKENS, dtype=torch.bool), "logits": peaked_logits(TOKENS, VOCABULARY)}
    inputs = {name: inputs[name] for name in ("logits", "targets", "mask")}
    inputs["logits"][5, 3] = torch.nan
    for backend in ("reference", "cpu", "triton"):
        out = run(inputs, backend)
        assert out["loss"].isnan()
        assert out["dlogits"].isnan().any(1).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_unchecked_targets_and_temperatures_out_of_range_are_nan(backend):
    inputs = rows()
    logits, options = inputs["logits"].nan_to_num(), (0.2, 0.2, None, 0.0, "k3", 0.0, 2.0, "token", "token_mean")
    mask = torch.ones(TOKENS, dtype=torch.bool)
    for row, target, temperature in ((2, VOCABULARY, 1.0), (2, -7, 1.0), (2, 0, -1.0), (2, 0, torch.inf)):
        targets, temperatures = torch.zeros(TOKENS, dtype=torch.int64), torch.ones(TOKENS)
        targets[row], temperatures[row] = target, temperature
        tensors = (logits, targets, 1.0, temperatures, ADVANTAGE, mask, None, None, None, CU_SEQLENS, None)
        out = torch.ops.mgrpo_kernels.logits_grpo_loss_fwd(*tensors, *options, None, None, True, True, backend)
        assert out[0].isnan()
        for values in (out[2], out[3], out[4], out[7][:, 0]):
            assert values.isnan().nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_meets_the_budget(isa):
    assert_pass_on(isa, __file__, "(every_term or any_stride) and not triton")


def test_opcheck_and_meta():
    inputs = {name: tensor.nan_to_num() for name, tensor in rows().items()}
    others = (inputs[name] for name in ("old_logprob", "ref_logprob", "rollout_logprob"))
    tensors = (inputs["logits"], inputs["targets"], 1.0, torch.ones(TOKENS), ADVANTAGE, inputs["mask"], *others)
    options = (0.2, 0.2, 1.5, 0.1, "k3", 0.05, 1.3, "token", "constant", 12, None)
    for needed in ((False, False), (True, False), (True, True)):
        arguments = (*tensors, CU_SEQLENS, torch.tensor(3.0), *options, *needed, "cpu")
        torch.library.opcheck(torch.ops.mgrpo_kernels.logits_grpo_loss_fwd, arguments)
    moved = {name: tensor.to("meta") for name, tensor in (NEEDS | inputs).items()}
    leaf = moved.pop("logits").requires_grad_()
    for backend in ("auto", "cpu", "triton"):
        for ratio in ("token", "sequence"):
            out = mgrpo_kernels.logits_grpo_loss(leaf, **moved, ratio=ratio, backend=backend)
            (gradient,) = torch.autograd.grad(out.loss, leaf)
            assert gradient.shape == leaf.shape and gradient.is_meta and out.metrics["kl"].is_meta


@pytest.mark.slow
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_compiles_whole(logits_grpo_loss, ratio):
    inputs = rows()
    logits = inputs.pop("logits")

    def loss_of(leaf: Tensor) -> tuple[Tensor, Tensor]:
        out = logits_grpo_loss(leaf, **inputs, **NEEDS, **FULL, ratio=ratio)
        return out.loss, out.metrics["kl"]

    results = []
    for op in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        loss, kl = op(leaf)
        (2 * loss).backward()
        results.append((loss.detach(), kl, leaf.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("cu_seqlens must be given", {"cu_seqlens": None}),
        (r"targets must be in \[0, 5\)", {"targets": torch.full((3,), 5)}),
        ("temperature must be", {"temperature": 0.0}),
        (r"mask must be of shape \[T\]", {"mask": torch.ones(2, 3, dtype=torch.bool)}),
        (r"old_logprob must be of shape \[T\] = \[3\]", {"old_logprob": torch.ones(2)}),
        ("kl must be one of", {"kl": "k4"}),
        ("backend must be one of", {"backend": "none"}),
    ],
)
def test_wrong_arguments_of_the_compositions_are_refused(message, arguments):
    shared = {
        "targets": torch.zeros(3, dtype=torch.int64),
        "advantage": torch.ones(1),
        "mask": torch.ones(3, dtype=torch.bool),
        "cu_seqlens": torch.tensor([0, 3]),
    }
    with pytest.raises(ValueError, match=f"^logits_grpo_loss: {message}"):
        mgrpo_kernels.logits_grpo_loss(torch.zeros(3, 5), **(shared | arguments))
    with pytest.raises(ValueError, match=f"^linear_grpo_loss: {message}"):
        mgrpo_kernels.linear_grpo_loss(torch.zeros(3, 4), torch.zeros(5, 4), **(shared | arguments))
    with pytest.raises(ValueError, match=r"^logits_grpo_loss: logits must be of unit stride"):
        mgrpo_kernels.logits_grpo_loss(torch.zeros(5, 3).T, **shared)
    with pytest.raises(ValueError, match=r"^linear_grpo_loss: weight must be of shape"):
        mgrpo_kernels.linear_grpo_loss(torch.zeros(3, 4), torch.zeros(5, 3), **shared)
