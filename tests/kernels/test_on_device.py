"""Every operation where it will run: on a GPU its GPU backends, which these tests verify, elsewhere the CPU's.

`pytest -m gpu --verify-record DIR` writes what passed; see bench/verified.py. Letters: see the package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import mgrpo_kernels as K
from mgrpo_kernels.operations import OPERATIONS
from mgrpo_kernels.testing import assert_within_budget, exponent_length, peaked_logits, poison_masked, round_gradient

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
BACKENDS = [name for name in ("cuda", "triton") if K.backends()[name].available] if HAS_GPU else ["cpu"]
FP32, BF16, FP16, INT64 = torch.float32, torch.bfloat16, torch.float16, torch.int64
FLOATS = (FP32, BF16, FP16)
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]
Inputs = dict[str, Any]
Outputs = dict[str, Tensor]


class Op(NamedTuple):
    """One operation on inputs of a size, small or large, and what its results may be off by."""

    make: Callable[[torch.dtype, bool], Inputs]
    call: Callable[[Inputs, str], Outputs]
    length: Callable[[Inputs], int]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    rows: tuple[str, ...] = ()  # inputs whose first dimension is cut for a batch of one; none where rows meet
    baseline: Callable[[Inputs], Outputs] | None = None  # with the roundings that the operation documents


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_device(**inputs: Any) -> Inputs:
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def make_rows(dtype: torch.dtype, large: bool) -> Inputs:
    """Logits with -inf and a row stride beyond V; a quarter of the rows is masked and holds NaN."""
    rows, vocabulary = (300 if HAS_GPU else 12, 151_936) if large else (13, 1_027)
    logits = peaked_logits(rows, vocabulary + 5)[:, :vocabulary]
    logits[1, ::3] = -torch.inf
    targets = torch.where(torch.arange(rows) % 2 == 0, logits.argmax(1), torch.arange(rows) * 7 % vocabulary)
    targets[1] = 1
    mask = torch.arange(rows) % 4 != 2
    return on_device(
        logits=poison_masked(logits, mask).to(dtype),
        targets=targets,
        mask=mask,
        temperature=0.6 + normal(rows, seed=1).abs(),
    )


@cache
def upstream(shape: torch.Size, seed: int) -> Tensor:
    """Random numbers that lie on the device from their first use on: no later call copies them."""
    return normal(*shape, seed=seed).to(DEVICE)


def with_gradients(outputs: Outputs, leaves: Outputs) -> Outputs:
    """Results and the gradients, named d..., of their sum, each times its own random numbers."""
    total = sum(
        (output.float() * upstream(output.shape, seed)).sum().double() for seed, output in enumerate(outputs.values())
    )
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: output.detach() for name, output in outputs.items()} | named


def token_logprob(x: Inputs, backend: str, **options: Any) -> Outputs:
    leaf = x["logits"].detach().requires_grad_()
    out = K.token_logprob(leaf, x["targets"], temperature=x["temperature"], mask=x["mask"], backend=backend, **options)
    return with_gradients({k: v for k, v in out._asdict().items() if v is not None}, {"logits": leaf})


def make_head(dtype: torch.dtype, large: bool) -> Inputs:
    rows, size, vocabulary = (256, 320, 32_003 if HAS_GPU else 3_203) if large else (13, 24, 131)
    weight, targets = normal(vocabulary, size) * 3 / size**0.5, torch.arange(rows) * 7 % vocabulary
    mask = torch.arange(rows) % 4 != 2
    hidden = poison_masked(normal(rows, size, seed=1) + weight[targets], mask)
    return on_device(
        hidden=hidden.to(dtype), weight=weight.to(dtype), targets=targets, mask=mask, temperature=0.7, budget_bytes=None
    )


def linear_token_logprob(x: Inputs, backend: str) -> Outputs:
    leaves = {name: x[name].detach().requires_grad_() for name in ("hidden", "weight")}
    options = {name: x[name] for name in ("targets", "mask", "temperature", "budget_bytes")}
    out = K.linear_token_logprob(**leaves, **options, backend=backend)
    return with_gradients({k: v for k, v in out._asdict().items() if v is not None}, leaves)


def whole_logits(hidden: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    logits = hidden.float().masked_fill(~mask[:, None], 0) @ weight.float().T
    return round_gradient(logits, BF16) if hidden.dtype == BF16 else logits


def linear_token_logprob_baseline(x: Inputs) -> Outputs:
    leaves = {name: x[name].detach().requires_grad_() for name in ("hidden", "weight")}
    logits = whole_logits(*leaves.values(), x["mask"])
    out = K.token_logprob(logits, x["targets"], temperature=0.7, mask=x["mask"], backend="reference")
    return with_gradients({k: v for k, v in out._asdict().items() if v is not None}, leaves)


def make_loss(rows: int) -> Inputs:
    """Log-probs of five sequences, one of them empty."""
    cuts = torch.tensor([0, rows // 4, rows // 4, rows // 2, rows // 2 + 1, rows], dtype=torch.int32)
    logprob = -normal(rows, seed=2).abs()
    others = {name: logprob + 0.3 * normal(rows, seed=3 + i) for i, name in enumerate(("old", "ref", "rollout"))}
    return on_device(
        logprob=logprob,
        entropy=normal(rows, seed=7).abs(),
        mask=torch.arange(rows) % 5 != 3,
        advantage=torch.tensor([1.2, 0.7, -0.8, 0.0, -1.5]),
        cu_seqlens=cuts,
        **{f"{name}_logprob": value for name, value in others.items()},
    )


LOSS = {"dual_clip": 1.5, "kl_coef": 0.1, "entropy_coef": 0.05, "tis_cap": 1.3, "clip_high": 0.28, "max_length": 999}
KINDS = [("token", "token_mean"), ("sequence", "sequence_mean_token_mean"), ("token", "constant")]


def losses(op: Callable[..., K.GrpoLoss], x: Inputs, leaves: Outputs) -> Outputs:
    """Loss, metrics and gradients of each kind of ratio and mean."""
    outputs = {}
    for ratio, reduce in KINDS:
        out = op(**(x | leaves), **LOSS, ratio=ratio, reduce=reduce)
        gradients = torch.autograd.grad(out.loss, list(leaves.values()))
        # As one vector, whose largest entry sets the rounding: terms of both signs cancel in some.
        scalars = torch.stack([out.loss.detach().float(), *(value.float() for value in out.metrics.values())])
        named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        outputs |= {f"{ratio}, {reduce}: {k}": v for k, v in ({"scalars": scalars} | named).items()}
    return outputs


def grpo_loss(x: Inputs, backend: str) -> Outputs:
    leaves = {name: x[name].detach().requires_grad_() for name in ("logprob", "entropy")}
    return losses(partial(K.grpo_loss, backend=backend), x, leaves)


def near(logprob: Tensor) -> Inputs:
    """The log-probs of other policies near the trained one's."""
    others = {}
    for seed, name in enumerate(("old_logprob", "ref_logprob", "rollout_logprob")):
        others[name] = logprob + 0.3 * normal(*logprob.shape, seed=3 + seed).to(logprob.device)
    return others


def loss_on_top(x: Inputs, logprob: Tensor) -> Inputs:
    fields = make_loss(x["targets"].shape[0])
    return x | {name: fields[name] for name in ("advantage", "cu_seqlens")} | near(logprob)


def make_logits_loss(dtype: torch.dtype, large: bool) -> Inputs:
    x = make_rows(dtype, large) | {"temperature": 0.8}
    x["logits"][1] = x["logits"][0]
    picked = K.token_logprob(**(x | {"logits": x["logits"].float()}), backend="reference").logprob
    return loss_on_top(x, picked)


def logits_grpo_loss(x: Inputs, backend: str) -> Outputs:
    leaf = x["logits"].detach().requires_grad_()
    return losses(partial(K.logits_grpo_loss, backend=backend), x, {"logits": leaf})


def linear_grpo_loss_baseline(x: Inputs) -> Outputs:
    def op(hidden: Tensor, weight: Tensor, *, budget_bytes: None, **options: Any) -> K.GrpoLoss:
        logits = whole_logits(hidden, weight, options["mask"])
        return K.logits_grpo_loss(logits, **options, backend="reference")

    return losses(op, x, {name: x[name].detach().requires_grad_() for name in ("hidden", "weight")})


def make_linear_loss(dtype: torch.dtype, large: bool) -> Inputs:
    x = make_head(dtype, large)
    wide = {name: x[name].float() for name in ("hidden", "weight")}
    return loss_on_top(x, K.linear_token_logprob(**(x | wide), backend="reference").logprob)


def linear_grpo_loss(x: Inputs, backend: str) -> Outputs:
    leaves = {name: x[name].detach().requires_grad_() for name in ("hidden", "weight")}
    return losses(partial(K.linear_grpo_loss, backend=backend), x, leaves)


def make_trajectories(dtype: torch.dtype, large: bool) -> Inputs:
    tokens = 65_537 if large else 203
    cuts = torch.tensor([0, 3, 3, tokens // 2, tokens // 2 + 1, tokens], dtype=torch.int32)
    return on_device(tokens=normal(tokens).abs().to(dtype), cu_seqlens=cuts)


def trajectory_entropy(x: Inputs, backend: str) -> Outputs:
    leaf = x["tokens"].detach().requires_grad_()
    packed = {
        r: K.trajectory_entropy(leaf, cu_seqlens=x["cu_seqlens"], reduce=r, backend=backend) for r in ("mean", "sum")
    }
    padded = leaf[: leaf.shape[0] // 7 * 7].view(7, -1)
    mask = torch.arange(padded.numel(), device=DEVICE).view_as(padded) % 3 != 0
    padded_mean = K.trajectory_entropy(padded, mask=mask, backend=backend)
    return with_gradients(packed | {"padded": padded_mean}, {"tokens": leaf})


def make_averages(dtype: torch.dtype, large: bool) -> Inputs:
    """More tensors than one launch describes, of odd sizes, some unaligned; every dtype takes part."""
    sizes = [70_001 if large else 4_099, 1, 0, 64, 4_096, *([33] * (1_100 if large else 70))]
    lists = {}
    for seed, name in enumerate(("momentum", "policy")):
        lists[name] = [normal(size + 1, seed=seed + 2 * i)[i % 2 : i % 2 + size] for i, size in enumerate(sizes)]
    momentum = [t.to(DEVICE, dtype) for t in lists["momentum"]]
    policy = [t.to(DEVICE, (FP32, BF16, FP16)[i % 3]) for i, t in enumerate(lists["policy"])]
    return {"momentum": momentum, "policy": policy, "decay": torch.tensor(0.9, device=DEVICE)}


def ema_update(x: Inputs, backend: str) -> Outputs:
    """Nearest with a copy in bf16, and stochastic, whose mean the budget cannot know: its bits are compared apart."""
    wide = x["momentum"][0].dtype == torch.float64
    momentum = [t.clone() for t in x["momentum"]]
    publish = [torch.empty_like(t, dtype=t.dtype if wide else BF16) for t in momentum]
    K.ema_update_(momentum, x["policy"], x["decay"], publish=publish, backend=backend)
    return {"momentum": torch.cat(momentum), "publish": torch.cat(publish)}


def make_groups(dtype: torch.dtype, large: bool) -> Inputs:
    prompts, rollouts = (512, 32) if large else (7, 11)
    values = normal(prompts, rollouts).to(dtype)
    values[0] = 1.0
    ids = torch.randint(-1, 4, (prompts, rollouts), generator=torch.Generator().manual_seed(1))
    keep = torch.rand(prompts, rollouts, generator=torch.Generator().manual_seed(2)) > 0.3
    keep[1] = False
    return on_device(values=values, ids=ids, keep=keep, weights=(ids % 3 + 1).int(), tie_break=ids % 2 == 0)


def group_advantage(x: Inputs, backend: str) -> Outputs:
    modes = ("std", "mean", "leave_one_out", "sign")
    return {m: K.group_advantage(x["values"], keep=x["keep"], mode=m, backend=backend) for m in modes}


def majority_vote(x: Inputs, backend: str) -> Outputs:
    plain = K.majority_vote(x["ids"], backend=backend)._asdict()
    options = {name: x[name] for name in ("keep", "weights", "tie_break")}
    full = K.majority_vote(x["ids"], **options, backend=backend)._asdict()
    return {f"plain {k}": v for k, v in plain.items()} | {f"full {k}": v for k, v in full.items()}


def iqr_filter(x: Inputs, backend: str, scopes: tuple[str, ...] = ("batch", "prompt")) -> Outputs:
    found = {}
    for scope in scopes:
        for keep in (None, x["keep"]):
            out = K.iqr_filter(x["values"].float(), keep=keep, scope=scope, two_sided=keep is None, backend=backend)
            found |= {f"{scope} {keep is None} {name}": value for name, value in out._asdict().items()}
    return found


def rows_length(x: Inputs) -> int:
    temperature = x["temperature"]
    least = float(temperature.min()) if isinstance(temperature, Tensor) else temperature
    return x["logits"].shape[1] + 12 + 2 * exponent_length(x["logits"], least)


def bits(x: Inputs) -> int:
    """No error at all."""
    return 0


def head_length(x: Inputs) -> int:
    return x["weight"].shape[0] * x["weight"].shape[1]


OPS = {
    "token_logprob": Op(make_rows, token_logprob, rows_length, rows=("logits", "targets", "mask", "temperature")),
    "linear_token_logprob": Op(make_head, linear_token_logprob, head_length, baseline=linear_token_logprob_baseline),
    "trajectory_entropy": Op(make_trajectories, trajectory_entropy, lambda x: x["tokens"].shape[0]),
    "ema_update_": Op(make_averages, ema_update, lambda x: 2),
    "group_advantage": Op(make_groups, group_advantage, lambda x: 32, rows=("values", "keep")),
    "majority_vote": Op(
        make_groups, majority_vote, lambda x: 1, dtypes=(INT64,), rows=("ids", "keep", "weights", "tie_break")
    ),
    "iqr_filter": Op(make_groups, iqr_filter, bits, dtypes=(FP32,)),
    "grpo_loss": Op(lambda d, large: make_loss(65_537 if large else 203), grpo_loss, lambda x: 300, dtypes=(FP32,)),
    "logits_grpo_loss": Op(make_logits_loss, logits_grpo_loss, rows_length),
    "linear_grpo_loss": Op(make_linear_loss, linear_grpo_loss, head_length, baseline=linear_grpo_loss_baseline),
}
assert OPS.keys() == OPERATIONS.keys()
EACH = [
    pytest.param(op, dtype, backend, id=f"{op}-{str(dtype).removeprefix('torch.')}-{backend}")
    for op, spec in OPS.items()
    for dtype in spec.dtypes
    for backend in BACKENDS
]
ONE_DTYPE = [
    pytest.param(op, spec.dtypes[0], backend, id=f"{op}-{backend}") for op, spec in OPS.items() for backend in BACKENDS
]
each = pytest.mark.parametrize(("op", "dtype", "backend"), EACH)
one_dtype = pytest.mark.parametrize(("op", "dtype", "backend"), ONE_DTYPE)
# Only where there is a GPU, for `pytest -m gpu` must not collect what it has no device for.
everywhere = pytest.mark.gpu if HAS_GPU else lambda test: test


def convert(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [convert(each, dtype) for each in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def make(op: str, dtype: torch.dtype, large: bool) -> Inputs:
    return OPS[op].make(FP32 if dtype == INT64 else dtype, large)


@everywhere
@each
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_agrees_with_fp64(op, dtype, backend, large):
    spec, inputs = OPS[op], make(op, dtype, large)
    found = spec.call(inputs, backend)
    oracle = spec.call({name: convert(value, torch.float64) for name, value in inputs.items()}, "reference")
    rounded = spec.baseline(inputs) if spec.baseline else spec.call(inputs, "reference")
    assert found.keys() == oracle.keys() == rounded.keys()
    for name, value in found.items():
        assert value.device == DEVICE and value.dtype == rounded[name].dtype, name
        if spec.length is bits or not value.is_floating_point():
            assert torch.equal(value.nan_to_num(7), rounded[name].nan_to_num(7)), name
            continue
        assert_within_budget(
            value, oracle[name].double(), rounded[name], reduction_length=spec.length(inputs), what=f"{op}: {name}"
        )


@everywhere
@each
def test_gives_the_same_bits_again(op, dtype, backend):
    inputs = make(op, dtype, False)
    first, second = (OPS[op].call(inputs, backend) for _ in range(2))
    assert all(torch.equal(value.nan_to_num(7), second[name].nan_to_num(7)) for name, value in first.items())


@everywhere
@pytest.mark.parametrize(("op", "dtype", "backend"), [each for each in EACH if OPS[str(each.values[0])].rows])
def test_a_row_gives_the_same_bits_in_any_batch(op, dtype, backend):
    spec, inputs = OPS[op], make(op, dtype, True)
    whole = spec.call(inputs, backend)
    for row in (0, 5, 7):
        part = {k: v[row : row + 1] if k in spec.rows else v for k, v in inputs.items()}
        if op == "token_logprob":  # whose upstream gradients go by position
            with torch.no_grad():
                alone = K.token_logprob(**part, backend=backend)._asdict()
            alone = {name: value for name, value in alone.items() if value is not None}
        else:
            alone = spec.call(part, backend)
        for name, value in alone.items():
            assert torch.equal(value, whole[name][row : row + 1]), f"{name} of row {row}"


@everywhere
@pytest.mark.verifies("token_logprob")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_options_of_token_logprob(backend, softcap, inplace_backward):
    x = make_rows(FP32, False)
    options = {"softcap": softcap, "self_certainty": True}
    oracle = token_logprob({name: convert(value, torch.float64) for name, value in x.items()}, "reference", **options)
    rounded = token_logprob(x, "reference", **options)
    # In place it writes over the logits, so it comes last.
    found = token_logprob(x, backend, **options, inplace_backward=inplace_backward)
    for name, value in found.items():
        assert_within_budget(value, oracle[name].double(), rounded[name], reduction_length=rows_length(x), what=name)


@everywhere
@pytest.mark.verifies("ema_update_")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_stochastic_rounding_gives_the_reference_bits(backend, dtype):
    found = []
    for name in (backend, "reference"):
        x = make_averages(dtype, False)
        compensation = [torch.zeros_like(t) if t.dtype == BF16 else None for t in x["momentum"]]
        options = {"rounding": "stochastic", "seed": 3, "step": 5, "backend": name}
        K.ema_update_(x["momentum"], x["policy"], 0.99, **options)
        offsets = [2**34 * index + index for index in range(len(x["momentum"]))]
        K.ema_update_(x["momentum"], x["policy"], 0.9, **options, offsets=offsets)
        if dtype == BF16:
            K.ema_update_(x["momentum"], x["policy"], 0.99, compensation=compensation, backend=name)
        found.append(torch.cat(x["momentum"]))
    assert torch.equal(*found)


class TestOnAGpu:
    """What only a GPU can show."""

    pytestmark = NEEDS_GPU

    @one_dtype
    def test_never_waits_for_the_device(self, op, dtype, backend):
        inputs = make(op, dtype, False)
        OPS[op].call(inputs, backend)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            OPS[op].call(inputs, backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @one_dtype
    def test_a_graph_replays_the_same_bits(self, op, dtype, backend):
        inputs = make(op, dtype, False)
        expected = OPS[op].call(inputs, backend)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            OPS[op].call(inputs, backend)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = OPS[op].call(inputs, backend)
        for value in captured.values():
            value.fill_(1)
        graph.replay()
        torch.cuda.synchronize()
        for name, value in captured.items():
            assert torch.equal(value.nan_to_num(7), expected[name].nan_to_num(7)), name

    @one_dtype
    def test_runs_on_the_current_stream(self, op, dtype, backend):
        """A stream that is busy delays it: what it reads is written there just before."""
        inputs = make(op, dtype, False)
        expected = OPS[op].call(inputs, backend)
        late = {name: poison(value) for name, value in inputs.items()}
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(50_000_000)
            for name, value in inputs.items():
                copy_into(late[name], value)
            found = OPS[op].call(late, backend)
        torch.cuda.synchronize()
        for name, value in found.items():
            assert torch.equal(value.nan_to_num(7), expected[name].nan_to_num(7)), name

    @pytest.mark.verifies("token_logprob")
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_offsets_beyond_2_31(self, backend):
        """The last rows of a tensor of more than 2^31 logits give what they give alone."""
        rows, vocabulary = 2**31 // 151_936 + 3, 151_936
        logits = torch.zeros(rows, vocabulary, dtype=BF16, device=DEVICE)
        last = peaked_logits(3, vocabulary).to(DEVICE, BF16)
        logits[-3:] = last
        targets = torch.full((rows,), 5, device=DEVICE)
        results = []
        for leaf in (logits.requires_grad_(), last.clone().requires_grad_()):
            out = K.token_logprob(leaf, targets[: leaf.shape[0]], inplace_backward=True, backend=backend)
            (out.logprob.sum() + out.entropy.sum()).backward()
            assert leaf.grad is not None
            results.append([out.logprob[-3:], out.entropy[-3:], leaf.grad[-3:]])
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))

    @pytest.mark.verifies("token_logprob")
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_bad_value_spoils_its_row_alone(self, backend):
        logits = peaked_logits(4, 300).to(DEVICE)
        targets = torch.tensor([3, 300, -7, 299], device=DEVICE)
        found = K.token_logprob(logits, targets, backend=backend).logprob
        assert found.isnan().tolist() == [False, True, True, False]


def poison(value: Any) -> Any:
    """A twin of an input with other values, valid ones where they are indices or boundaries."""
    if isinstance(value, list):
        return [poison(each) for each in value]
    if not isinstance(value, Tensor):
        return value
    twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return twin.fill_(torch.nan) if value.is_floating_point() else twin.zero_()


def copy_into(target: Any, value: Any) -> None:
    if isinstance(value, list):
        for pair in zip(target, value, strict=True):
            copy_into(*pair)
    elif isinstance(value, Tensor):
        target.copy_(value)
