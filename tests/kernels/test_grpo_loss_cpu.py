from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import assert_pass_on
from torch import Tensor

import mgrpo_kernels
from mgrpo_kernels.testing import assert_within_budget, poison_masked

FULL = {"dual_clip": 1.5, "kl_coef": 0.1, "entropy_coef": 0.05, "tis_cap": 1.3, "clip_high": 0.28}


def batch(num: int, length: int, dtype: torch.dtype, seed: int, *, pack: bool = False) -> dict[str, Tensor]:
    """Arguments of a loss with every tensor, poisoned outside the mask; packed sequences have random lengths."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num * length,) if pack else (num, length)
    logprob = -3 * torch.rand(shape, generator=generator)
    out = {"logprob": logprob, "entropy": 2 * torch.rand(shape, generator=generator)}
    for name in ("old_logprob", "ref_logprob", "rollout_logprob"):
        out[name] = logprob + 0.5 * torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) > 0.3
    out = {name: poison_masked(tensor, mask).to(dtype) for name, tensor in out.items()} | {"mask": mask}
    out["advantage"] = torch.randn(num, generator=generator)
    if pack:
        ends = torch.randint(0, num * length + 1, (num - 1,), generator=generator).sort().values
        out["cu_seqlens"] = torch.cat([torch.tensor([0]), ends, torch.tensor([num * length])])
    return out


def run(op, arguments: dict, to: torch.dtype | None = None, upstream: float = 1.0) -> dict[str, Tensor]:
    """Loss, metrics and both gradients, of the arguments converted to a dtype."""
    arguments = {
        name: value.detach().to(to) if to and isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    leaves = {name: arguments[name].detach().requires_grad_() for name in ("logprob", "entropy")}
    out = op(**(arguments | leaves))
    gradients = torch.autograd.grad(out.loss * upstream, list(leaves.values()), allow_unused=True)
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
    return {"loss": out.loss.detach(), **out.metrics, **named}


def metrics(results: dict[str, Tensor]) -> Tensor:
    """All metrics as one vector, whose largest entry sets the rounding: terms of both signs cancel in some."""
    values = [value for name, value in results.items() if name[0] != "d" and name != "loss"]
    return torch.stack(values).to(results["loss"].dtype)


def size_before_cancelling(op, arguments: dict) -> float:
    """What the loss's terms come to when they meet at random: gains and losses apart, neither of which cancels."""
    advantage, tokens = arguments["advantage"], int(arguments["mask"].sum())
    parts = (advantage.clamp_min(0), advantage.clamp_max(0))
    losses = [run(op, arguments | {"advantage": part}, torch.float64)["loss"] for part in parts]
    return float(torch.stack(losses).abs().max()) / max(tokens, 1) ** 0.5


def assert_near_fp64(backend: str, arguments: dict, dtype: torch.dtype, upstream: float = 1.0) -> None:
    """A compiled backend against the reference in fp64, with that of the reference in fp32 as a budget."""
    reference = partial(mgrpo_kernels.grpo_loss, backend="reference")
    oracle, rounded = (run(reference, arguments, to, upstream) for to in (torch.float64, torch.float32))
    actual = run(partial(mgrpo_kernels.grpo_loss, backend=backend), arguments, None, upstream)
    assert actual.keys() == oracle.keys()
    # Beside the sum over tokens, a token's own terms are rounded a dozen times.
    length = arguments["mask"].numel() + 12
    for name in actual.keys() & {"dlogprob", "dentropy"}:
        assert actual[name].dtype == dtype
        values = (actual[name], oracle[name], rounded[name].to(dtype))
        assert_within_budget(*values, reduction_length=length, what=name)
    assert_within_budget(*map(metrics, (actual, oracle, rounded)), reduction_length=length, what="metrics")
    assert_within_budget(
        *(results["loss"] for results in (actual, oracle, rounded)),
        reduction_length=length,
        largest_term=size_before_cancelling(reference, arguments),
        what="loss",
    )


ANYTHING = {
    "num": st.integers(1, 5),
    "length": st.integers(1, 40),
    "pack": st.booleans(),
    "transposed": st.booleans(),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "absent": st.sets(st.sampled_from(["old_logprob", "ref_logprob", "rollout_logprob", "entropy_coef"])),
    "kl": st.sampled_from(["k1", "k2", "k3"]),
    "ratio": st.sampled_from(["token", "sequence"]),
    "reduce": st.sampled_from(["token_mean", "sequence_mean_token_mean", "constant"]),
    "dual_clip": st.sampled_from([None, 1.5]),
    "normalizer": st.sampled_from([None, 7, 0.5, torch.tensor(11), torch.tensor(3.5)]),
    "by_token": st.booleans(),
    "upstream": st.sampled_from([1.0, -0.3]),
    "seed": st.integers(0, 2**16),
}


def check_anything(
    backend,
    num,
    length,
    pack,
    transposed,
    dtype,
    absent,
    kl,
    ratio,
    reduce,
    dual_clip,
    normalizer,
    by_token,
    upstream,
    seed,
):
    arguments = batch(num, length, dtype, seed, pack=pack)
    if by_token:
        arguments["advantage"] = torch.randn(arguments["mask"].shape, generator=torch.Generator().manual_seed(seed))
    if transposed:
        names = ("logprob", "entropy", "old_logprob", "ref_logprob", "rollout_logprob", "mask")
        arguments |= {name: torch.stack([arguments[name]] * 2, -1)[..., 1] for name in names}
    options = {"kl": kl, "ratio": ratio, "reduce": reduce, "dual_clip": dual_clip, "normalizer": normalizer}
    options |= {"entropy_coef": 0.05, "kl_coef": 0.1, "tis_cap": 1.3, "max_length": length}
    if "ref_logprob" in absent:
        options["kl_coef"] = 0.0
    dropped = dict.fromkeys(absent - {"entropy_coef"}) | ({"entropy_coef": 0.0} if "entropy_coef" in absent else {})
    assert_near_fp64(backend, arguments | options | dropped, dtype, upstream)


@settings(max_examples=150, deadline=None)
@given(**ANYTHING)
def test_any_shape_stride_dtype_and_option(**drawn):
    check_anything("cpu", **drawn)


@settings(max_examples=30, deadline=None)
@given(**ANYTHING)
def test_any_shape_stride_dtype_and_option_in_triton(**drawn):
    check_anything("triton", **drawn)


@pytest.mark.parametrize("tokens", [1023, 1024, 1025, 5003])
@pytest.mark.parametrize("options", [{"ratio": "sequence"}, {"reduce": "sequence_mean_token_mean"}, {}])
def test_runs_of_tokens_meet_in_the_right_place(tokens, options):
    assert_near_fp64("cpu", batch(1, tokens, torch.float32, 1) | FULL | options, torch.float32)
    assert_near_fp64("cpu", batch(tokens, 1, torch.float32, 2, pack=True) | FULL | options, torch.float32)


@pytest.mark.parametrize("length", [227, 292, 293, 586])
@pytest.mark.parametrize("options", [{"ratio": "sequence"}, {"reduce": "sequence_mean_token_mean"}, {}])
def test_runs_of_tokens_meet_in_the_right_place_in_triton(length, options):
    assert_near_fp64("triton", batch(7, length, torch.float32, 1) | FULL | options, torch.float32)
    assert_near_fp64("triton", batch(7, length, torch.float32, 2, pack=True) | FULL | options, torch.float32)


@pytest.mark.parametrize("pack", [False, True])
def test_the_thread_count_changes_no_bit(pack):
    arguments = batch(7, 1500, torch.float32, 3, pack=pack) | FULL | {"ratio": "sequence"}
    arguments |= {"reduce": "sequence_mean_token_mean"}
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(partial(mgrpo_kernels.grpo_loss, backend="cpu"), arguments))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_extreme_values_agree_in_all_backends(kl, ratio):
    generator = torch.Generator().manual_seed(5)
    inf, nan = torch.inf, torch.nan
    extremes = torch.tensor([-inf, -2e4, -1e4, -300.0, -103.5, -88.9, -88.0, -20.0, -1.0, -0.999999, 0.0, nan, inf])
    advantages = torch.tensor([-2.0, -0.0, 0.0, 3.0, nan, inf, -inf])
    results = {"reference": [], "cpu": [], "triton": []}
    for example in range(250):
        picked = extremes[torch.randint(len(extremes), (4, 1, 1), generator=generator)]
        names = ("logprob", "old_logprob", "ref_logprob", "rollout_logprob")
        arguments = dict(zip(names, picked, strict=True)) | {"mask": torch.ones(1, 1, dtype=torch.bool)}
        arguments |= {"entropy": torch.ones(1, 1), "advantage": advantages[torch.randint(7, (1,), generator=generator)]}
        for backend, found in results.items():
            if backend == "triton" and example >= 50:
                continue
            op = partial(mgrpo_kernels.grpo_loss, backend=backend, kl=kl, kl_coef=0.5, ratio=ratio, dual_clip=3.0)
            found.append(torch.stack([value.reshape(()) for value in run(op, arguments).values()]))
    stacked = {backend: torch.stack(found) for backend, found in results.items()}
    for backend in ("cpu", "triton"):
        torch.testing.assert_close(stacked[backend], stacked["reference"][: len(stacked[backend])], equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_k3_of_close_policies_does_not_cancel(backend):
    ref = torch.full((1, 64), -1.0)
    logprob = (ref + torch.linspace(1e-5, 0.3, 64)).requires_grad_()
    mask = torch.ones(1, 64, dtype=torch.bool)
    out = mgrpo_kernels.grpo_loss(
        logprob, torch.zeros(1), mask, ref_logprob=ref, kl_coef=1.0, normalizer=1, backend=backend
    )
    out.loss.backward()
    gap = ref.double() - logprob.detach().double()
    torch.testing.assert_close(logprob.grad.double(), -torch.expm1(gap), rtol=3e-7, atol=0)
    for i in (0, 5, 20, 63):
        alone = mgrpo_kernels.grpo_loss(
            logprob.detach()[:, i : i + 1], torch.zeros(1), mask[:, :1], ref_logprob=ref[:, :1], backend=backend
        )
        exact = (torch.expm1(gap[0, i]) - gap[0, i]).float()
        torch.testing.assert_close(alone.metrics["kl"], exact, rtol=3e-7, atol=1e-18)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_second_backward_and_other_upstream_gradients(backend):
    arguments = batch(3, 9, torch.float32, 6)
    leaf = arguments.pop("logprob").requires_grad_()
    loss = mgrpo_kernels.grpo_loss(leaf, **arguments, backend=backend).loss
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
    scaled = torch.autograd.grad(-3 * loss, leaf, retain_graph=True)[0]
    again = torch.autograd.grad(loss, leaf)[0]
    assert torch.equal(scaled, -3 * first) and torch.equal(again, first) and first.abs().sum() > 0
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_output_element_is_written(backend):
    arguments = batch(3, 50, torch.float32, 7) | FULL
    expected = run(partial(mgrpo_kernels.grpo_loss, backend=backend), arguments)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        poisoned = run(partial(mgrpo_kernels.grpo_loss, backend=backend), arguments)
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(poisoned[name], value) and value.isfinite().all() for name, value in expected.items())


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_unchecked_boundaries_stay_inside_the_tokens(backend):
    inputs = batch(1, 20, torch.float32, 8, pack=True)
    mask, logprob = inputs["mask"], inputs["logprob"]
    options = (0.2, 0.2, None, 0.0, "k3", 0.0, 2.0, "sequence", "sequence_mean_token_mean", None, None)

    def loss(ends: list[int], advantage: list[float]) -> Tensor:
        tensors = (torch.tensor(advantage), mask, inputs["old_logprob"], None, None, torch.tensor(ends), None)
        outputs = torch.ops.mgrpo_kernels.grpo_loss_fwd(logprob, None, *tensors, *options, True, False, backend)
        return outputs[0]

    assert torch.equal(loss([0, 2**40], [1.5]), loss([0, 20], [1.5]))
    assert torch.equal(loss([0, 12, 10**6], [1.5, -1.0]), loss([0, 12, 20], [1.5, -1.0]))
    assert loss([-(2**40), 17, -5, 2**40], [1.0, 2.0, 3.0]).isfinite()
    assert loss([0], []).isfinite()


def test_fp64_goes_to_the_reference_and_is_refused_by_name():
    logprob, advantage, mask = torch.zeros(2, 3).double(), torch.ones(2), torch.ones(2, 3, dtype=torch.bool)
    assert mgrpo_kernels.grpo_loss(logprob, advantage, mask).loss.dtype == torch.float64
    with pytest.raises(ValueError, match=r"^grpo_loss: backend must be a backend for float64"):
        mgrpo_kernels.grpo_loss(logprob, advantage, mask, backend="cpu")


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_meets_the_budget(isa):
    assert_pass_on(isa, __file__, "(any_shape or right_place or extreme or cancel) and not triton")


def test_opcheck_and_meta():
    inputs = {name: tensor.nan_to_num() for name, tensor in batch(3, 5, torch.float32, 9, pack=True).items()}
    names = ("logprob", "entropy", "advantage", "mask", "old_logprob", "ref_logprob", "rollout_logprob", "cu_seqlens")
    options = (0.2, 0.2, 1.5, 0.1, "k3", 0.05, 1.3, "sequence", "constant", 12, None)
    for needed in ((False, False), (True, True)):
        arguments = (*(inputs[name] for name in names), torch.tensor(3.0), *options, *needed, "cpu")
        torch.library.opcheck(torch.ops.mgrpo_kernels.grpo_loss_fwd, arguments)
    arguments = {name: value.to("meta") for name, value in batch(2, 3, torch.bfloat16, 9).items()}
    leaf = arguments.pop("logprob").requires_grad_()
    for backend in ("auto", "cpu", "triton"):
        out = mgrpo_kernels.grpo_loss(leaf, **arguments, backend=backend)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        assert gradient.shape == leaf.shape and gradient.dtype == torch.bfloat16 and gradient.is_meta
        assert all(value.shape == () and value.is_meta for value in (out.loss, *out.metrics.values()))
