from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import mgrpo_kernels
from mgrpo_kernels.testing import assert_mutants_rejected, assert_within_budget, poison_masked

LENGTHS = [4, 0, 6, 1, 9]
CU_SEQLENS = torch.tensor([0, 4, 4, 10, 11, 20], dtype=torch.int32)
TOKENS, SEQUENCES = 20, 5
ADVANTAGE = torch.tensor([1.2, 0.7, -0.8, 0.0, -1.5])
METRICS = ("ratio_mean", "clip_low_share", "clip_high_share", "kl", "entropy", "tis_mean", "tis_clipped_share")
FULL = {"dual_clip": 1.5, "kl_coef": 0.1, "entropy_coef": 0.05, "tis_cap": 1.3, "clip_high": 0.28}


@pytest.fixture(params=["reference", "cpu", "triton"])
def grpo_loss(request):
    return partial(mgrpo_kernels.grpo_loss, backend=request.param)


def make_tokens(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    logprob = -2 * torch.rand(TOKENS, generator=generator)
    tokens = {"logprob": logprob, "entropy": torch.rand(TOKENS, generator=generator)}
    for name in ("old_logprob", "ref_logprob", "rollout_logprob"):
        tokens[name] = logprob + 0.6 * torch.randn(TOKENS, generator=generator)
    mask = torch.rand(TOKENS, generator=generator) > 0.2
    return {name: poison_masked(tensor, mask).to(dtype) for name, tensor in tokens.items()} | {"mask": mask}


def padded(tensor: Tensor) -> Tensor:
    """[T] -> [N, L]: False or NaN past the end of each sequence."""
    fill = False if tensor.dtype == torch.bool else torch.nan
    out = torch.full((SEQUENCES, max(LENGTHS)), fill, dtype=tensor.dtype)
    for row, part in enumerate(tensor.split(LENGTHS)):
        out[row, : len(part)] = part
    return out


def slow_loss(tokens: dict[str, Tensor], advantage: Tensor, options: dict, to: torch.dtype) -> tuple[Tensor, dict]:
    """The loss token by token, with Python branches instead of min, max and clip."""
    o = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "kl_coef": 0.0, "kl": "k3", "entropy_coef": 0.0}
    o |= {"tis_cap": 2.0, "ratio": "token", "reduce": "token_mean", "max_length": None} | options
    total, seen = [], {name: [] for name in METRICS}
    start = 0
    for row, length in enumerate(LENGTHS):
        chosen = [t for t in range(start, start + length) if tokens["mask"][t]]
        start += length
        lp, old, ref, roll, ent = (
            [tokens[name].to(to)[t] for t in chosen]
            for name in ("logprob", "old_logprob", "ref_logprob", "rollout_logprob", "entropy")
        )
        sequence_mean = sum((a.detach() - b for a, b in zip(lp, old, strict=True)), torch.tensor(0.0)) / max(len(lp), 1)
        part = []
        for i in range(len(chosen)):
            log_ratio = lp[i] - old[i] if o["ratio"] == "token" else sequence_mean + (lp[i] - lp[i].detach())
            rho, a = log_ratio.exp(), advantage[row].to(to)
            low, high = rho < 1 - o["clip_low"] and a < 0, rho > 1 + o["clip_high"] and a > 0
            surrogate = (1 - o["clip_low"]) * a if low else (1 + o["clip_high"]) * a if high else rho * a
            if o["dual_clip"] is not None and a < 0 and surrogate < o["dual_clip"] * a:
                surrogate = o["dual_clip"] * a
            weight = (old[i] - roll[i]).exp()
            tis = o["tis_cap"] if weight > o["tis_cap"] else weight
            d = ref[i] - lp[i]
            kl = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[o["kl"]]
            part.append(-tis * surrogate + o["kl_coef"] * kl - o["entropy_coef"] * ent[i])
            values = (rho, low, high, kl, ent[i], tis, weight > o["tis_cap"])
            for name, value in zip(METRICS, values, strict=True):
                seen[name].append(float(torch.as_tensor(value).detach()))
        total.append(part)
    flat = [loss for part in total for loss in part]
    if o["reduce"] == "token_mean":
        loss = sum(flat) / len(flat)
    elif o["reduce"] == "constant":
        loss = sum(flat) / (SEQUENCES * o["max_length"])
    else:
        loss = sum(sum(part) / len(part) for part in total if part) / SEQUENCES
    return loss, {name: sum(values) / len(values) for name, values in seen.items()}


def slow_result(options: dict, to: torch.dtype) -> tuple[Tensor, dict, dict[str, Tensor]]:
    tokens = make_tokens(to)
    leaves = {name: tokens[name].requires_grad_() for name in ("logprob", "entropy")}
    loss, metrics = slow_loss(tokens, ADVANTAGE, options, to)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return (
        loss,
        metrics,
        {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
        },
    )


def assert_matches(op, options: dict, *, pack: bool, token_advantage: bool) -> None:
    tokens = make_tokens()
    advantage = ADVANTAGE
    if token_advantage:
        advantage = ADVANTAGE.repeat_interleave(torch.tensor(LENGTHS)).masked_fill(~tokens["mask"], torch.nan)
    if not pack:
        tokens = {name: padded(tensor) for name, tensor in tokens.items()}
        advantage = padded(advantage) if token_advantage else advantage
    leaves = {name: tokens[name].requires_grad_() for name in ("logprob", "entropy")}
    others = {name: tokens[name] for name in ("old_logprob", "ref_logprob", "rollout_logprob", "entropy")}
    cu_seqlens = CU_SEQLENS if pack else None
    out = op(tokens["logprob"], advantage, mask=tokens["mask"], cu_seqlens=cu_seqlens, **others, **options)
    exact, rounded = (slow_result(options, to) for to in (torch.float64, torch.float32))
    assert out.loss.dtype == torch.float32 and out.loss.shape == ()
    assert_within_budget(out.loss.detach(), exact[0].detach().double(), rounded[0].detach(), reduction_length=TOKENS)
    assert tuple(out.metrics) == METRICS
    for name, value in out.metrics.items():
        assert value.dtype == torch.float32 and value.shape == () and not value.requires_grad
        torch.testing.assert_close(float(value), exact[1][name], rtol=1e-5, atol=1e-6)
    if out.loss.requires_grad:
        out.loss.backward()
    for name, leaf in leaves.items():
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        want, coarse = (result[2][name] for result in (exact, rounded))
        if not pack:
            want, coarse = (padded(tensor).nan_to_num() for tensor in (want, coarse))
        assert_within_budget(grad, want, coarse, reduction_length=TOKENS, what=f"gradient of {name}")


def check(op) -> None:
    for ratio in ("token", "sequence"):
        for reduce in ("token_mean", "sequence_mean_token_mean", "constant"):
            options = FULL | {"ratio": ratio, "reduce": reduce, "max_length": 12}
            assert_matches(op, options, pack=ratio == "token", token_advantage=reduce == "constant")


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("token_advantage", [True, False])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_matches_a_loop(grpo_loss, pack, token_advantage, kl, ratio):
    options = FULL | {"kl": kl, "ratio": ratio}
    assert_matches(grpo_loss, options, pack=pack, token_advantage=token_advantage)
    assert_matches(grpo_loss, {"kl": kl, "ratio": ratio, "clip_low": 0.1}, pack=pack, token_advantage=token_advantage)


def test_every_mutant_is_rejected(grpo_loss):
    def with_default(name: str, value: object):
        return lambda op: lambda *args, **kwargs: op(*args, **(kwargs | {name: value}))

    def last_token_skipped(op):
        def mutated(*args, mask, **kwargs):
            last = mask.flatten().nonzero()[-1]
            return op(*args, mask=mask.flatten().scatter(0, last, False).reshape(mask.shape), **kwargs)

        return mutated

    defaults = {
        "dual_clip": None,
        "kl_coef": 0.0,
        "entropy_coef": 0.0,
        "tis_cap": 1e9,
        "clip_high": 0.2,
        "ratio": "token",
    }
    extra = {f"default_{name}": with_default(name, value) for name, value in defaults.items()}
    extra |= {"last_token_skipped": last_token_skipped}
    without = ("shifted_row", "last_tile_skipped", "wrong_temperature")
    assert_mutants_rejected(grpo_loss, check, extra=extra, without=without)


def test_gradcheck():
    tokens = {name: tensor.nan_to_num() for name, tensor in make_tokens(torch.float64).items()}
    mask = tokens.pop("mask")
    logprob, entropy = tokens.pop("logprob").requires_grad_(), tokens.pop("entropy").requires_grad_()

    def run(logprob: Tensor, entropy: Tensor) -> Tensor:
        out = mgrpo_kernels.grpo_loss(
            logprob, ADVANTAGE, mask, entropy=entropy, cu_seqlens=CU_SEQLENS, **FULL, **tokens
        )
        assert out.loss.dtype == torch.float64
        return out.loss

    assert torch.autograd.gradcheck(run, (logprob, entropy))


def test_sequence_ratio_has_the_gradient_of_its_mean(grpo_loss):
    logprob = torch.tensor([-1.0, -0.4, -0.7], requires_grad=True)
    old = logprob.detach() - torch.tensor([0.1, -0.05, 0.02])
    mask = torch.ones(3, dtype=torch.bool)
    cu_seqlens = torch.tensor([0, 3])
    out = grpo_loss(logprob, torch.tensor([2.0]), mask, old_logprob=old, cu_seqlens=cu_seqlens, ratio="sequence")
    out.loss.backward()
    twin = logprob.detach().requires_grad_()
    (-2.0 * (twin - old).mean().exp()).backward()
    torch.testing.assert_close(logprob.grad, twin.grad)


@pytest.mark.parametrize("reduce", ["token_mean", "sequence_mean_token_mean", "constant"])
def test_micro_batches_add_up_with_a_normalizer(grpo_loss, reduce):
    tokens = {name: padded(tensor) for name, tensor in make_tokens().items()}
    mask = tokens.pop("mask")
    options = FULL | {"reduce": reduce, "max_length": 12}
    whole = grpo_loss(tokens.pop("logprob"), ADVANTAGE, mask, **tokens, **options).loss
    step = {"token_mean": mask.sum(), "sequence_mean_token_mean": torch.tensor(5), "constant": 60.0}[reduce]
    tokens = {name: padded(tensor) for name, tensor in make_tokens().items()}
    parts = torch.zeros(())
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        part = {name: tensor[rows] for name, tensor in tokens.items()}
        keep, lp = part.pop("mask"), part.pop("logprob")
        parts = parts + grpo_loss(lp, ADVANTAGE[rows], keep, **part, normalizer=step, **options).loss
    assert parts.dtype == torch.float32
    torch.testing.assert_close(parts, whole)


def test_defaults_are_on_policy_with_the_plain_policy_gradient(grpo_loss):
    logprob = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    out = grpo_loss(logprob, torch.tensor([1.0, -2.0]), mask)
    torch.testing.assert_close(out.loss, torch.tensor(0.0))
    out.loss.backward()
    torch.testing.assert_close(logprob.grad, torch.tensor([[-1 / 3, -1 / 3], [2 / 3, 0.0]]))
    assert [float(out.metrics[name]) for name in METRICS] == [1, 0, 0, 0, 0, 1, 0]


def test_minus_infinite_logprobs_and_overflowing_ratios_leave_finite_gradients(grpo_loss):
    inf = torch.inf
    logprob = torch.tensor([[-inf, -1.0, -1.0, -inf]], requires_grad=True)
    old = torch.tensor([[-inf, -inf, -1.0, -2.0]])
    rollout = torch.tensor([[-inf, -inf, -inf, -1.0]])
    ref = torch.full((1, 4), -inf)
    mask = torch.ones(1, 4, dtype=torch.bool)
    out = grpo_loss(logprob, torch.tensor([1.0]), mask, old_logprob=old, rollout_logprob=rollout, ref_logprob=ref)
    # Ratios 1, inf (clipped at 1.2), 1 and 0; weights 1, 1, cap and e^-1.
    torch.testing.assert_close(out.loss, torch.tensor(-(1 + 1.2 + 2.0 + 0.0) / 4))
    out.loss.backward()
    torch.testing.assert_close(logprob.grad, torch.tensor([[0.0, 0.0, -0.5, 0.0]]))
    torch.testing.assert_close(out.metrics["tis_mean"], torch.tensor((1 + 1 + 2 + math.exp(-1)) / 4))
    zero = logprob.detach().requires_grad_()
    unmoved = grpo_loss(zero, torch.tensor([0.0]), mask, old_logprob=old).loss
    unmoved.backward()
    assert unmoved.item() == 0 and torch.equal(zero.grad, torch.zeros(1, 4))


def test_nothing_flows_into_constants(grpo_loss):
    tokens = {name: tensor.nan_to_num() for name, tensor in make_tokens().items()}
    mask, logprob = tokens.pop("mask"), tokens.pop("logprob").requires_grad_()
    constants = [tensor.requires_grad_() for name, tensor in tokens.items() if name != "entropy"]
    advantage = ADVANTAGE.clone().requires_grad_()
    out = grpo_loss(logprob, advantage, mask, cu_seqlens=CU_SEQLENS, **tokens, **FULL)
    grads = torch.autograd.grad(out.loss, [logprob, advantage, *constants], allow_unused=True)
    assert grads[0] is not None and all(grad is None for grad in grads[1:])


def test_empty_masks_and_batches_give_zero_with_a_graph(grpo_loss):
    logprob = torch.full((2, 3), torch.nan, requires_grad=True)
    out = grpo_loss(logprob, torch.ones(2), torch.zeros(2, 3, dtype=torch.bool), reduce="sequence_mean_token_mean")
    out.loss.backward()
    assert out.loss.item() == 0 and torch.equal(logprob.grad, torch.zeros(2, 3))
    assert all(value.item() == 0 for value in out.metrics.values())
    nothing = torch.zeros(0, requires_grad=True)
    empty = grpo_loss(nothing, torch.zeros(0), torch.zeros(0).bool(), cu_seqlens=torch.tensor([0]), ratio="sequence")
    empty.loss.backward()
    assert empty.loss.item() == 0


@pytest.mark.slow
def test_compiles_whole(grpo_loss):
    tokens = make_tokens()
    mask = tokens.pop("mask")

    def run(logprob: Tensor) -> tuple[Tensor, Tensor]:
        out = grpo_loss(logprob, ADVANTAGE, mask, cu_seqlens=CU_SEQLENS, **others, **FULL, ratio="sequence")
        return out.loss, out.metrics["kl"]

    others = {name: tensor for name, tensor in tokens.items() if name != "logprob"}
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    gradients = []
    for op in (run, compiled):
        leaf = tokens["logprob"].clone().requires_grad_()
        loss, kl = op(leaf)
        loss.backward()
        gradients.append((loss.detach(), kl, leaf.grad))
    torch.testing.assert_close(gradients[1], gradients[0])


LOGPROB, MASK, A = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.ones(2)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"logprob must be of shape \[N, L\]", {"logprob": torch.zeros(6)}),
        (r"logprob must be of shape \[T\]", {"cu_seqlens": torch.tensor([0, 6])}),
        ("logprob must be of dtype", {"logprob": LOGPROB.int()}),
        (r"mask must be of shape \[N, L\] = \[2, 3\]", {"mask": MASK[:1]}),
        ("mask must be of dtype bool", {"mask": LOGPROB}),
        (r"advantage must be of shape \[N\] or \[N, L\] = \[2\]", {"advantage": torch.ones(3)}),
        ("advantage must be of dtype", {"advantage": torch.ones(2, 3).int()}),
        ("advantage must be a tensor", {"advantage": 1.0}),
        (r"old_logprob must be of shape \[N, L\]", {"old_logprob": A}),
        ("ref_logprob must be of dtype", {"ref_logprob": MASK}),
        ("rollout_logprob must be on cpu", {"rollout_logprob": LOGPROB.to("meta")}),
        ("entropy must be of shape", {"entropy": A}),
        ("entropy must be given where entropy_coef", {"entropy_coef": 0.1}),
        ("ref_logprob must be given where kl_coef > 0", {"kl_coef": 0.1}),
        ("kl_coef must be a finite number", {"kl_coef": -0.1}),
        ("entropy_coef must be a finite number", {"entropy_coef": float("nan")}),
        (r"clip_low must be a finite number in \[0, 1\]", {"clip_low": 1.5}),
        ("clip_high must be a finite number", {"clip_high": -0.1}),
        (r"dual_clip must be a finite number in \(1", {"dual_clip": 1.0}),
        ("tis_cap must be a finite number", {"tis_cap": 0.0}),
        ("kl must be one of", {"kl": "k4"}),
        ("ratio must be one of", {"ratio": "group"}),
        ("reduce must be one of", {"reduce": "mean"}),
        ("max_length must be given", {"reduce": "constant"}),
        ("max_length must be a finite number", {"max_length": 0}),
        ("normalizer must be a finite number", {"normalizer": 0}),
        ("normalizer must be a finite number", {"normalizer": torch.tensor(-1.0)}),
        (r"normalizer must be of shape \[\]", {"normalizer": torch.ones(1)}),
        (
            "cu_seqlens must be non-decreasing",
            {"logprob": A, "mask": MASK[0, :2], "cu_seqlens": torch.tensor([0, 1])},
        ),
        ("backend must be one of", {"backend": "none"}),
    ],
)
def test_wrong_arguments_are_refused(message, arguments):
    with pytest.raises(ValueError, match=f"^grpo_loss: {message}"):
        mgrpo_kernels.grpo_loss(**({"logprob": LOGPROB, "advantage": A, "mask": MASK} | arguments))
