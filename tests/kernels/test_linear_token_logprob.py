from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import assert_pass_on
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import mgrpo_kernels
from mgrpo_kernels import ops, token_logprob
from mgrpo_kernels._common.rows import RowSums, row_outputs
from mgrpo_kernels.linear_token_logprob import products
from mgrpo_kernels.linear_token_logprob import triton as launchers
from mgrpo_kernels.linear_token_logprob.tiles import memory_budget, plan_tiles, tile_columns, whole_waves
from mgrpo_kernels.testing import (
    assert_mutants_rejected,
    assert_within_budget,
    exponent_length,
    poison_masked,
    round_gradient,
)

ROWS, HIDDEN, VOCABULARY = 11, 16, 53
TEMPERATURE = torch.linspace(0.6, 1.5, ROWS)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("logprob", "entropy", "lse", "self_certainty")


@pytest.fixture(params=["reference", "cpu", "triton"])
def linear_token_logprob(request):
    return partial(mgrpo_kernels.linear_token_logprob, backend=request.param)


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    bias = torch.randn(VOCABULARY, generator=generator)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    mask = torch.rand(ROWS, generator=generator) > 0.3
    hidden += weight[targets] * 0.5  # peaked at the targets
    return poison_masked(hidden, mask).to(dtype), weight.to(dtype), bias.to(dtype), targets, mask


def results(op, hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    outputs = op(*leaves)
    total = torch.zeros((), dtype=torch.float64)
    for seed, output in enumerate(outputs):
        upstream = torch.randn(ROWS, generator=torch.Generator().manual_seed(seed))
        total = total + (output.double() * upstream).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [output.detach() for output in outputs], [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]


def materialised(to: torch.dtype, targets: Tensor, mask: Tensor, softcap: float | None):
    """The same from whole logits, by log_softmax and plain autograd in one dtype."""

    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        z = torch.where(mask[:, None], hidden, 0).to(to) @ weight.to(to).T + bias.to(to)
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / TEMPERATURE.to(to)[:, None]
        logp, lse = z.log_softmax(1), z.logsumexp(1)
        outputs = (logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1), lse, lse - z.mean(1))
        return [torch.where(mask, output, 0) for output in outputs]

    return op


def check(
    op, *, dtype: torch.dtype = torch.float32, softcap: float | None = None, budget_bytes: int | None = 20 * 4 * 76
) -> None:
    hidden, weight, bias, targets, mask = make_inputs(dtype)

    def run(*leaves: Tensor):
        return op(
            leaves[0],
            leaves[1],
            targets,
            bias=leaves[2],
            temperature=TEMPERATURE,
            mask=mask,
            softcap=softcap,
            self_certainty=True,
            budget_bytes=budget_bytes,
        )

    outputs, gradients = results(run, hidden, weight, bias)
    exact = results(
        materialised(torch.float64, targets, mask, softcap), hidden.double(), weight.double(), bias.double()
    )
    rounded = results(materialised(torch.float32, targets, mask, softcap), hidden, weight, bias)
    for index, name in enumerate(NAMES):
        length = VOCABULARY * HIDDEN
        assert_within_budget(outputs[index], exact[0][index], rounded[0][index], reduction_length=length, what=name)
    for index, name in enumerate(("dhidden", "dweight", "dbias")):
        assert gradients[index].dtype == dtype
        assert_within_budget(gradients[index], exact[1][index], rounded[1][index], reduction_length=ROWS, what=name)
    assert torch.equal(gradients[0][~mask], torch.zeros_like(gradients[0][~mask]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "budget_bytes"), [(None, None), (5.0, 20 * 4 * 76), (None, 1)])
def test_outputs_and_gradients_match_fp64(linear_token_logprob, dtype, softcap, budget_bytes):
    check(linear_token_logprob, dtype=dtype, softcap=softcap, budget_bytes=budget_bytes)


def test_every_mutant_is_rejected(linear_token_logprob):
    def without_last_columns(op):
        def mutated(hidden, weight, targets, *, bias, **kwargs):
            keep = torch.arange(VOCABULARY) < VOCABULARY - 3
            return op(hidden, weight, targets, bias=bias.masked_fill(~keep, -torch.inf), **kwargs)

        return mutated

    assert_mutants_rejected(linear_token_logprob, check, extra={"last_columns_skipped": without_last_columns})


def test_gradcheck_across_tiles():
    linear_token_logprob = partial(mgrpo_kernels.linear_token_logprob, backend="reference")
    hidden, weight, bias, targets, _ = (tensor[:4] for tensor in make_inputs(torch.float64))
    leaves = [tensor.nan_to_num().mul(0.3).requires_grad_() for tensor in (hidden, weight[:7], bias[:0])]
    leaves[2] = torch.linspace(-1, 1, leaves[1].shape[0], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, -100, 1])

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out = linear_token_logprob(
            hidden, weight, targets, bias=bias, temperature=0.8, softcap=2.0, self_certainty=True, budget_bytes=1
        )
        return tuple(out)

    assert torch.autograd.gradcheck(run, leaves)


def test_tiles_stay_within_the_budget():
    hidden = torch.zeros(8, 16)
    column = 4 * (4 * 8 + 2 * 16)
    assert tile_columns(hidden, 1000, 10 * column + 1) == 10
    assert tile_columns(hidden, 1000, 1) == 1
    assert tile_columns(hidden, 7, 10**9) == 7
    assert tile_columns(hidden, 10**9, None) == 64 * 2**20 // column


def test_no_product_is_larger_than_its_tile(monkeypatch):
    linear_token_logprob = partial(mgrpo_kernels.linear_token_logprob, backend="reference")
    hidden, weight, _, targets, _ = make_inputs()
    hidden = hidden.nan_to_num().requires_grad_()
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[:1] == (ROWS,) and out.dim() == 2:
                largest = max(largest, out.shape[1])
            return out

    with Largest():
        linear_token_logprob(hidden, weight, targets, budget_bytes=1200).logprob.sum().backward()
    assert largest == HIDDEN  # a tile has three columns; only hidden and its gradient are wider


def test_masked_rows_enter_no_product():
    linear_token_logprob = partial(mgrpo_kernels.linear_token_logprob, backend="reference")
    hidden, weight, _, targets, mask = make_inputs()
    rows = []

    class Rows(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                rows.append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    with Rows():
        linear_token_logprob(hidden, weight, targets, mask=mask)
    assert rows == [int(mask.sum())]


def test_frozen_weight_minus_infinite_bias_and_no_rows(linear_token_logprob):
    hidden, weight, bias, targets, _ = make_inputs()
    hidden = hidden.nan_to_num().requires_grad_()
    bias[40:] = -torch.inf  # padding of the vocabulary, several whole tiles
    targets = targets.clamp_max(39)
    out = linear_token_logprob(hidden, weight, targets, bias=bias, self_certainty=True, budget_bytes=2400)
    cut = token_logprob(hidden.detach() @ weight[:40].T + bias[:40], targets, self_certainty=True)
    for one, other in zip(out, cut, strict=True):
        torch.testing.assert_close(one, other)
    sum(out).sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad is None
    masked = linear_token_logprob(hidden, weight, torch.full((ROWS,), -100))
    masked.logprob.sum().backward()
    assert torch.equal(masked.entropy, torch.zeros(ROWS))
    assert linear_token_logprob(hidden[:0], weight, targets[:0]).lse.shape == (0,)


def test_autocast_does_not_lower_the_precision(linear_token_logprob):
    hidden, weight, _, targets, _ = make_inputs()
    hidden = hidden.nan_to_num()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = linear_token_logprob(hidden, weight, targets).logprob
    assert torch.equal(lowered, linear_token_logprob(hidden, weight, targets).logprob)


def drawn(
    tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that point at their targets, a weight, and targets."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, hidden_size, generator=generator)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    hidden = torch.randn(tokens, hidden_size, generator=generator) + weight[targets]
    return (hidden / hidden_size**0.25).to(dtype), (weight / hidden_size**0.25).to(dtype), targets


def gradients_of(op, hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> tuple[Tensor, ...]:
    """Outputs and both gradients for an upstream that is not constant."""
    leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
    out = op(*leaves, targets, **options)
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(len(targets), generator=generator).to(out.lse.dtype) for _ in range(3)]
    total = sum((output * each).sum() for output, each in zip(out[:3], upstream, strict=True))
    return (*(output.detach() for output in out[:3]), *torch.autograd.grad(total, leaves))


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, to: torch.dtype) -> tuple[Tensor, ...]:
    """Outputs and gradients from whole logits in one dtype, whose gradient is rounded to the inputs'."""

    def op(hidden: Tensor, weight: Tensor, targets: Tensor):
        logits = round_gradient(hidden.to(to) @ weight.to(to).T, hidden.dtype)
        logp = logits.log_softmax(1)
        outputs = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1), logits.logsumexp(1), None
        return mgrpo_kernels.TokenLogprob(*outputs)

    return gradients_of(op, hidden, weight, targets)


def assert_matches_whole_logits(hidden: Tensor, weight: Tensor, targets: Tensor, *, backend="cpu", **options) -> None:
    """The compiled kernel against whole logits in fp64; the budget is that of whole logits in fp32."""
    native = partial(mgrpo_kernels.linear_token_logprob, backend=backend, **options)
    actual = gradients_of(native, hidden, weight, targets)
    exact = plain(hidden.double(), weight.double(), targets, torch.float64)
    rounded = plain(hidden, weight, targets, torch.float32)
    length = max(weight.shape[0], len(hidden)) * hidden.shape[1]
    # Outputs are differences of logits; a gradient of the logits is some three upstream gradients of size 2, which
    # cancel where p is near 1.
    logit = float((hidden.double() @ weight.double().T).abs().max())
    largest = (logit, logit, logit, 6 * float(weight.abs().max()), 6 * float(hidden.abs().max()))
    for index, name in enumerate((*NAMES[:3], "dhidden", "dweight")):
        assert actual[index].dtype == rounded[index].dtype
        sizes = {"reduction_length": length, "largest_term": largest[index]}
        assert_within_budget(actual[index], exact[index], rounded[index], what=name, **sizes)


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(1, 40),
    hidden_size=st.integers(1, 70),
    vocabulary=st.integers(1, 90),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    budget=st.sampled_from([None, 1, 20_000]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_stride_and_dtype(tokens, hidden_size, vocabulary, padding, dtype, budget, seed):
    hidden, weight, targets = drawn(tokens, hidden_size, vocabulary, dtype, seed)
    strided = []
    for tensor, extra in zip((hidden, weight), padding, strict=True):
        storage = torch.full((tensor.shape[0], tensor.shape[1] + extra), torch.nan, dtype=dtype)
        strided.append(storage[:, : tensor.shape[1]].copy_(tensor))
    assert_matches_whole_logits(*strided, targets, budget_bytes=budget)


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 6),
    hidden_size=st.integers(1, 20),
    vocabulary=st.integers(1, 60),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    budget=st.sampled_from([None, 1, 2000]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_on_triton(tokens, hidden_size, vocabulary, dtype, budget, seed):
    inputs = drawn(tokens, hidden_size, vocabulary, dtype, seed)
    assert_matches_whole_logits(*inputs, budget_bytes=budget, backend="triton")


@pytest.mark.parametrize("shape", [(1, 64, 1), (3, 32, 32256), (2, 16, 151936), (600, 48, 700), (33, 130, 4097)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_of_real_vocabularies_and_several_blocks(shape, dtype):
    assert_matches_whole_logits(*drawn(*shape, dtype, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_thread_count_changes_no_bit(dtype):
    hidden, weight, targets = drawn(70, 96, 2500, dtype, seed=2)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        native = partial(mgrpo_kernels.linear_token_logprob, backend="cpu")
        results.append(gradients_of(native, hidden, weight, targets))
    torch.set_num_threads(before)
    # The gradients of fp32 are products of torch's library, which promises no such thing.
    promised = 5 if dtype == torch.bfloat16 else 3
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0][:promised], other[:promised], strict=True))


def test_rows_without_upstream_gradient_enter_no_product():
    hidden, weight, targets = drawn(12, 32, 100, torch.bfloat16, seed=3)
    keep = torch.arange(12) % 3 == 0
    upstream = torch.where(keep, 1.5, 0.0)
    results = []
    for poisoned in (False, True):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = mgrpo_kernels.linear_token_logprob(*leaves, targets, backend="cpu")
        if poisoned:
            leaves[0].data[~keep] = torch.nan
        out.logprob.backward(upstream)
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not results[0][0][~keep].any() and results[0][0][keep].any()
    leaf = weight.clone().requires_grad_()
    mgrpo_kernels.linear_token_logprob(hidden, leaf, targets, backend="cpu").lse.backward(torch.zeros(12))
    assert torch.equal(leaf.grad, torch.zeros_like(weight))


def peak_kib_of(statements: str) -> int:
    """Growth of a process's largest resident size over `statements`, in KiB."""
    script = (
        "import re, torch, mgrpo_kernels as K\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "torch.set_num_threads(2)\n"
        "h = torch.randn(128, 256).bfloat16().requires_grad_()\n"
        "w = torch.randn(60_000, 256).bfloat16().requires_grad_()\n"
        "y = torch.randint(60_000, (128,))\n"
        "K.linear_token_logprob(h[:4], w[:9], y[:4] % 9).logprob.sum().backward()\n"
        "(h[:4] @ w[:9].T).sum().backward()\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # the peak starts again from here
        "before = peak()\n"
        f"{statements}\n"
        "print(peak() - before)"
    )
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_within_the_budget():
    weight_kib = 60_000 * 256 * 2 // 1024
    native = "K.linear_token_logprob(h, w, y, budget_bytes={}, backend='cpu').logprob.sum().backward()"
    for budget_kib in (2048, 16384):
        # The gradient of the weight, once and as it is added to .grad, is no temporary.
        used = peak_kib_of(native.format(budget_kib * 1024)) - 2 * weight_kib
        assert used < budget_kib + 4096, used
    naive = "torch.nn.functional.cross_entropy((h @ w.T).float(), y).backward()"
    # Whole logits are seen by this measure; autograd may take their weight's gradient over without a second copy.
    assert peak_kib_of(naive) - weight_kib > 2 * 128 * 60_000 * 4 // 1024


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_meets_the_budget(isa):
    assert_pass_on(isa, __file__, "(match_fp64 or several_blocks or thread_count) and not reference and not 151936")


def test_opcheck_and_meta():
    hidden, weight, targets = drawn(5, 16, 40, torch.float32, seed=4)
    bias, temperatures = torch.randn(40), torch.linspace(0.5, 1.5, 5)
    head = (hidden, weight, bias, targets, 1.0, temperatures, 6.0, None)
    for self_certainty in (False, True):
        torch.library.opcheck(
            torch.ops.mgrpo_kernels.linear_token_logprob_fwd, (*head, self_certainty, [], False, "cpu")
        )
    rows = [torch.rand(5) for _ in range(6)]
    for needed in ((True, True, True), (True, False, False), (False, True, False)):
        inputs = (*head, *rows, [], [], False, *needed, "cpu")
        torch.library.opcheck(torch.ops.mgrpo_kernels.linear_token_logprob_bwd, inputs)
    out = mgrpo_kernels.linear_token_logprob(*(tensor.to("meta") for tensor in (hidden, weight, targets)))
    assert [output.shape for output in out[:3]] == [(5,)] * 3 and out.lse.device.type == "meta"


@pytest.mark.slow
def test_compiles_whole(linear_token_logprob):
    hidden, weight, bias, targets, mask = make_inputs()

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return linear_token_logprob(hidden, weight, targets, bias=bias, mask=mask, budget_bytes=12000)[:3]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager, traced = (results(op, hidden, weight, bias) for op in (run, compiled))
    torch.testing.assert_close(traced, eager)


def _sharded(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for backend, sizes in (("reference", (20, 33)), ("cpu", (3, 50)), ("triton", (27, 26))):
            _assert_sharded_matches_whole(rank, backend, sizes, None)
        for backend in ("cpu", "triton"):
            _assert_sharded_matches_whole(rank, backend, (27, 26), mesh)
        _assert_wrong_placements_are_refused(mesh)
    finally:
        dist.destroy_process_group()


def _assert_sharded_matches_whole(rank: int, backend: str, sizes: tuple[int, int], mesh) -> None:
    """By a group, or with a mesh by DTensors, whose sizes must be those of torch.chunk."""
    linear_token_logprob = partial(mgrpo_kernels.linear_token_logprob, backend=backend)
    hidden, weight, bias, targets, mask = make_inputs()
    bias[: sizes[0]] = -torch.inf if sizes[0] < 5 else bias[: sizes[0]]
    targets = targets.clamp_min(5)
    start = sum(sizes[:rank])
    mine = slice(start, start + sizes[rank])
    options = {"temperature": TEMPERATURE, "mask": mask, "self_certainty": True, "budget_bytes": 4000}
    group = dist.group.WORLD if mesh is None else None
    head = (weight[mine], bias[mine])
    if mesh is not None:
        head = tuple(DTensor.from_local(part, mesh, [Shard(0)], shape=w.shape, stride=w.stride())
                     for part, w in zip(head, (weight, bias), strict=True))  # fmt: skip

    def whole(hidden: Tensor, weight: Tensor, bias: Tensor):
        return linear_token_logprob(hidden, weight, targets, bias=bias, **options)

    def shard(hidden: Tensor, weight: Tensor, bias: Tensor):
        return linear_token_logprob(hidden, weight, targets, bias=bias, group=group, **options)

    expected, (dhidden, dweight, dbias) = results(whole, hidden, weight, bias)
    actual, gradients = results(shard, hidden, *head)
    if mesh is not None:
        assert all(gradient.placements == (Shard(0),) for gradient in gradients[1:])
        assert gradients[1].shape == weight.shape
        gradients = [gradients[0], *(gradient.to_local() for gradient in gradients[1:])]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(gradients, (dhidden, dweight[mine], dbias[mine]), strict=True):
        torch.testing.assert_close(one, other)
    with patch.object(dist, "all_gather", wraps=dist.all_gather) as gathers, patch.object(dist, "all_reduce") as sums:
        shard(hidden, *head)
    # The sizes of a group's shards, which a placement tells, and everything else at once.
    assert gathers.call_count == (2 if mesh is None else 1) and not sums.called
    with pytest.raises(ValueError, match=r"targets must be in \[0, 53\)"):
        linear_token_logprob(hidden, head[0], torch.full_like(targets, 53), mask=mask, group=group)


def _assert_wrong_placements_are_refused(mesh) -> None:
    hidden, weight, bias, targets, mask = make_inputs()
    run = partial(mgrpo_kernels.linear_token_logprob, hidden, targets=targets, mask=mask)
    for placement in (Shard(1), Partial()):
        with pytest.raises(ValueError, match=r"weight must be replicated or sharded once, on dim 0, got \["):
            run(DTensor.from_local(weight, mesh, [placement], run_check=False))
    uneven = weight[:20] if mesh.get_rank() == 0 else weight[20:]
    with pytest.raises(ValueError, match=r"weight must be split as by torch.chunk, 2[67] rows here, got (20|33)\."):
        run(DTensor.from_local(uneven, mesh, [Shard(0)], shape=weight.shape, stride=weight.stride()))
    whole = DTensor.from_local(weight, mesh, [Replicate()], run_check=False)
    with pytest.raises(ValueError, match="group must be None where weight is a DTensor"):
        run(whole, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="bias must be a DTensor placed as weight"):
        run(whole, bias=bias)
    assert torch.equal(run(whole).logprob, run(weight).logprob)


@pytest.mark.slow
def test_sharded_vocabulary_matches_the_whole(tmp_path):
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['_sharded'](int(sys.argv[2]), sys.argv[3])"
    command, environment = (
        [sys.executable, "-c", code, __file__],
        os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    ranks = [subprocess.Popen([*command, rank, tmp_path / "store"], env=environment) for rank in ("0", "1")]
    assert [process.wait(900) for process in ranks] == [0, 0]


X, W, Y = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"hidden must be of shape \[T, D\]", {"hidden": X[0]}),
        (r"weight must be of shape \[V, D\] = \[any, 4\]", {"weight": W[:, :3]}),
        (r"weight must be of dtype float32", {"weight": W.bfloat16()}),
        (r"weight must be of unit stride along D, got strides \(1, 5\)", {"weight": torch.zeros(4, 5).T}),
        (r"hidden must be dense, got sparse_coo", {"hidden": X.to_sparse()}),
        (r"V >= 1", {"weight": W[:0]}),
        (r"bias must be of shape \[V\] = \[5\]", {"bias": torch.zeros(4)}),
        (r"budget_bytes must be >= 1", {"budget_bytes": 0}),
        (r"targets must be in \[0, 5\)", {"targets": Y + 5}),
        (r"mask must be of shape", {"mask": torch.ones(2, dtype=torch.bool)}),
        (r"temperature must be finite and > 0", {"temperature": torch.tensor([1.0, torch.inf, 1.0])}),
        (r"softcap must be", {"softcap": -1.0}),
        (r"backend must be one of", {"backend": "none"}),
    ],
)
def test_wrong_arguments_are_refused(linear_token_logprob, message, arguments):
    with pytest.raises(ValueError, match=f"^linear_token_logprob: .*{message}"):
        linear_token_logprob(**({"hidden": X, "weight": W, "targets": Y} | arguments))


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_sums_of_the_cuda_path_are_those_of_the_reference(budget, softcap, is_exact):
    """With the row kernel of the CPU in the place of the GPU's."""
    hidden, weight, bias, targets, _ = make_inputs()
    hidden = hidden.nan_to_num()
    bias[:3] = -torch.inf  # a tile of one column without any finite logit
    head = (hidden, weight, bias, targets, 1.0, TEMPERATURE, softcap or 0.0, budget, True)
    *sums, z_target, _, _ = products.linear_token_logprob_fwd(
        *head, [], False, row_sums=partial(products.cuda_row_sums, is_exact=is_exact)
    )
    found = row_outputs(RowSums(*sums), z_target, torch.ones(ROWS, dtype=torch.bool))
    rest = {"temperature": TEMPERATURE, "softcap": softcap, "self_certainty": True, "backend": "reference"}
    oracle, rounded = (
        mgrpo_kernels.linear_token_logprob(hidden.to(to), weight.to(to), targets, bias=bias.to(to), **rest)
        for to in (torch.float64, torch.float32)
    )
    logits = hidden @ weight.T
    length = VOCABULARY * HIDDEN + exponent_length(logits, float(TEMPERATURE.min()))
    for name, actual, exact, near in zip(NAMES, found, oracle, rounded, strict=True):
        assert_within_budget(actual, exact, near, reduction_length=length, what=name)


@contextmanager
def on_cuda_path():
    """Backend "triton" runs what "cuda" does, with the row kernels of the CPU in the place of the GPU's."""

    def forward(hidden: Tensor, *args):
        row_sums = partial(products.cuda_row_sums, is_exact=hidden.dtype != BF16)
        return products.linear_token_logprob_fwd(hidden, *args, row_sums=row_sums)

    backward = partial(products.linear_token_logprob_bwd, backend="cpu")
    with patch.multiple(launchers, linear_token_logprob_fwd=forward, linear_token_logprob_bwd=backward):
        ops._launcher.cache_clear()
        yield
    ops._launcher.cache_clear()


@pytest.fixture
def cuda_path():
    with on_cuda_path():
        yield


class Count:
    """FLOP of the products since the last call."""

    def __init__(self, monkeypatch):
        self.flop, self.product = 0, products._product
        monkeypatch.setattr(products, "_product", self)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return self.product(a, b)

    def take(self) -> int:
        flop, self.flop = self.flop, 0
        return flop


def kept_bytes(run) -> int:
    """Bytes of the blocks, in what `run` saves for its backward, that are as tall as hidden and no input."""
    kept = {}

    def save(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        inputs = run()
    for tensor in inputs:
        kept.pop(tensor.data_ptr(), None)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values() if tensor.dim() == 2)


@pytest.mark.parametrize(
    ("dtype", "budget", "bytes_kept"),
    # All logits fit, or all in 16 bits, or a part, or none.
    [
        (FP32, 2000, 4 * 360),
        (FP16, 2000, 4 * 360),
        (BF16, 2000, 4 * 360),
        (BF16, 1400, 2 * 360),
        (FP32, 600, 4 * 6 * 18),
        (BF16, 600, 2 * 6 * 38),
        (BF16, 1, 0),
    ],
)
def test_logits_that_fit_are_multiplied_once(monkeypatch, cuda_path, dtype, budget, bytes_kept):
    hidden, weight, targets = drawn(6, 2, 60, dtype, seed=5)
    leaves, count = (hidden.requires_grad_(), weight.requires_grad_()), Count(monkeypatch)
    one, outputs = 2 * 6 * 2 * 60, []

    def run() -> tuple[Tensor, ...]:
        out = mgrpo_kernels.linear_token_logprob(*leaves, targets, budget_bytes=budget, backend="triton")
        outputs.append(out.logprob.sum() + 0.3 * out.entropy.sum())
        return leaves

    assert kept_bytes(run) == bytes_kept <= budget
    assert count.take() == one
    gradients = torch.autograd.grad(outputs[0], leaves, retain_graph=True)
    again = one - bytes_kept // (4 if dtype != BF16 or budget == 2000 else 2) * 2 * 2
    assert count.take() == 2 * one + again
    for first, second in zip(gradients, torch.autograd.grad(outputs[0], leaves), strict=True):
        assert torch.equal(first, second)
    count.take()
    frozen = mgrpo_kernels.linear_token_logprob(
        hidden, weight.detach(), targets, budget_bytes=budget, backend="triton"
    ).logprob.sum()
    frozen.backward()
    assert count.take() == 2 * one + again
    with torch.no_grad():
        assert kept_bytes(run) == 0


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    hidden_size=st.integers(1, 70),
    vocabulary=st.integers(1, 90),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    share=st.floats(0, 2),
    seed=st.integers(0, 2**16),
)
def test_any_budget_on_the_cuda_path(tokens, hidden_size, vocabulary, dtype, share, seed):
    """From nothing kept to everything."""
    budget = 1 + int(share * 4 * tokens * vocabulary)
    with on_cuda_path():
        inputs = drawn(tokens, hidden_size, vocabulary, dtype, seed)
        assert_matches_whole_logits(*inputs, budget_bytes=budget, backend="triton")


@pytest.mark.parametrize("budget", [2000, 1400])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_kept_logits_on_triton(dtype, budget):
    assert_matches_whole_logits(*drawn(6, 2, 60, dtype, seed=6), budget_bytes=budget, backend="triton")


@pytest.mark.parametrize("path", ["cuda", "triton"])
def test_kept_halves_of_tiles_without_a_finite_logit(request, path):
    """With a temperature of each row, whose anchors differ, and gradients of all outputs."""
    if path == "cuda":
        request.getfixturevalue("cuda_path")
    hidden, weight, targets = drawn(6, 2, 60, BF16, seed=7)
    bias = torch.zeros(60).masked_fill(torch.arange(60) < 21, -torch.inf)
    targets = targets.clamp_min(30)
    assert plan_tiles(hidden, 60, 1400, keep=True) == (10, [10] * 6, True)
    found = []
    for backend, to in (("triton", BF16), ("reference", torch.float64), ("reference", FP32)):
        leaves = [tensor.to(to).requires_grad_() for tensor in (hidden.detach(), weight.detach())]
        out = mgrpo_kernels.linear_token_logprob(
            *leaves,
            targets,
            bias=bias.to(to),
            temperature=TEMPERATURE[:6],
            self_certainty=True,
            budget_bytes=1400,
            backend=backend,
        )
        upstream = [torch.linspace(-1, 2, 6).roll(shift).double() for shift in range(4)]
        total = sum((output.double() * each).sum() for output, each in zip(out, upstream, strict=True))
        found.append(torch.autograd.grad(total, leaves))
    for actual, exact, near in zip(*found, strict=True):
        # What the rounding of the gradients to bf16 alone does, of the logits and of the result.
        rounded = near + exact.abs().max().float() * 2**-8
        assert_within_budget(actual, exact, rounded, reduction_length=60 * 6, largest_term=10.0)


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.integers(0, 20_000),
    hidden_size=st.integers(1, 8192),
    vocabulary=st.integers(1, 300_000),
    budget=st.integers(1, 2**36),
    dtype=st.sampled_from([FP32, BF16]),
    softcap=st.sampled_from([0.0, 30.0]),
)
def test_tiles_and_what_is_kept_stay_within_the_budget(tokens, hidden_size, vocabulary, budget, dtype, softcap):
    hidden = torch.empty(tokens, hidden_size, dtype=dtype, device="meta")
    tile, kept, halved = plan_tiles(hidden, vocabulary, budget, keep=True, softcap=softcap)
    assert 1 <= tile <= vocabulary and sum(kept) <= vocabulary and all(0 < width <= tile for width in kept)
    work = 8 * (tokens + hidden_size)
    assert (tile == 1 and not kept) or (2 if halved else 4) * tokens * sum(kept) + work * tile <= budget
    assert halved <= (dtype == BF16 and softcap == 0)
    if 4 * max(1, tokens) * vocabulary <= budget * 3 // 4 and work <= budget // 4:
        assert sum(kept) == vocabulary and not halved
    assert plan_tiles(hidden, vocabulary, budget, keep=False).kept == []


def test_waves_are_whole():
    # 64 blocks of rows on 132 processors: 33 blocks of columns are 16 waves.
    assert whole_waves(151_936, 8192, 132) == 17 * 8448 and 64 * 33 % 132 == 0
    assert whole_waves(8448, 8100, 132) == 8448
    # Of 12 blocks of rows 11 blocks of columns are one wave, of one block of rows 132.
    assert whole_waves(5000, 1536, 132) == 2816
    assert whole_waves(2**17, 1, 132) == 3 * 256 * 132
    # No wave fits: whole blocks, and without one whatever there is.
    assert whole_waves(5000, 1, 132) == 19 * 256
    assert [whole_waves(columns, 8192, 132) for columns in (1, 255, 256)] == [1, 255, 256]


def test_a_quarter_of_what_a_gpu_has_free_holds_the_logits_of_a_micro_batch():
    """On an H200 in the middle of a training, by a tensor without data: torch's cache counts as free."""
    free = {"mem_get_info": (10 * 2**30, 0), "memory_reserved": 100 * 2**30, "memory_allocated": 70 * 2**30}
    processors = SimpleNamespace(multi_processor_count=132)
    with patch.multiple(torch.cuda, **{name: Mock(return_value=value) for name, value in free.items()}):
        budget = memory_budget(torch.device("cuda", 0), None)
    assert budget == 10 * 2**30 and memory_budget(torch.device("cuda", 0), 7) == 7
    with FakeTensorMode(), patch.object(torch.cuda, "get_device_properties", return_value=processors):
        hidden = torch.empty(8192, 2560, dtype=BF16, device="cuda")
        tile, kept, halved = plan_tiles(hidden, 151_936, budget, keep=True)
        assert tile % 8448 == 0 and sum(kept) == 151_936 and not halved
        hidden = torch.empty(16384, 2560, dtype=BF16, device="cuda")
        tile, kept, halved = plan_tiles(hidden, 151_936, budget, keep=True)
        assert tile % 8448 == 0 and sum(kept) == 151_936 and halved


def test_opcheck_of_what_is_kept():
    hidden, weight, targets = drawn(3, 4, 20, BF16, seed=8)
    head = (hidden, weight, None, targets, 1.0, None, 0.0, 4000)
    rows = [torch.rand(3) for _ in range(6)]
    for halved in (False, True):
        forward = torch.ops.mgrpo_kernels.linear_token_logprob_fwd
        torch.library.opcheck(forward, (*head, False, [12, 8], halved, "triton"))
        *_, kept, anchors = forward(*head, False, [12, 8], halved, "triton")
        assert [block.shape for block in kept] == [(3, 12), (3, 8)] and len(anchors) == 2 * halved
        inputs = (*head, *rows, kept, anchors, False, True, True, False, "triton")
        torch.library.opcheck(torch.ops.mgrpo_kernels.linear_token_logprob_bwd, inputs)


def test_rows_that_a_mask_on_the_cpu_removes_enter_no_product():
    """With tensors without data in the place of a GPU's."""
    hidden, weight, _, targets, mask = make_inputs()
    hidden, weight, targets = (tensor.to("meta") for tensor in (hidden, weight, targets))
    rows = []

    class Rows(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "mgrpo_kernels":
                rows.append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    hidden.requires_grad_()
    for where in (mask, mask.to("meta")):
        with Rows():
            run = partial(
                mgrpo_kernels.linear_token_logprob, hidden, weight, targets, temperature=TEMPERATURE.to("meta")
            )
            out = run(mask=where, self_certainty=True, backend="triton")
            sum(output.sum() for output in out).backward()
        assert all(output.shape == (ROWS,) and output.is_meta for output in out)
    assert rows == [int(mask.sum())] * 2 + [ROWS] * 2
    with pytest.raises(ValueError, match=r"mask must be of shape \[T\] = \[11\]"):
        run(mask=mask[1:])
