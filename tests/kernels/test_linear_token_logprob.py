from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from mgrpo_kernels import linear_token_logprob, token_logprob
from mgrpo_kernels.linear_token_logprob.reference import tile_columns
from mgrpo_kernels.testing import assert_mutants_rejected, assert_within_budget, poison_masked

ROWS, HIDDEN, VOCABULARY = 11, 16, 53
TEMPERATURE = torch.linspace(0.6, 1.5, ROWS)
NAMES = ("logprob", "entropy", "lse", "self_certainty")


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
def test_outputs_and_gradients_match_fp64(dtype, softcap, budget_bytes):
    check(linear_token_logprob, dtype=dtype, softcap=softcap, budget_bytes=budget_bytes)


def test_every_mutant_is_rejected():
    def without_last_columns(op):
        def mutated(hidden, weight, targets, *, bias, **kwargs):
            keep = torch.arange(VOCABULARY) < VOCABULARY - 3
            return op(hidden, weight, targets, bias=bias.masked_fill(~keep, -torch.inf), **kwargs)

        return mutated

    assert_mutants_rejected(linear_token_logprob, check, extra={"last_columns_skipped": without_last_columns})


def test_gradcheck_across_tiles():
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


def test_frozen_weight_minus_infinite_bias_and_no_rows():
    hidden, weight, bias, targets, _ = make_inputs()
    hidden = hidden.nan_to_num().requires_grad_()
    bias[40:] = -torch.inf  # padding of the vocabulary, several whole tiles
    targets = targets.clamp_max(39)
    out = linear_token_logprob(hidden, weight, targets, bias=bias, self_certainty=True, budget_bytes=1200)
    cut = token_logprob(hidden.detach() @ weight[:40].T + bias[:40], targets, self_certainty=True)
    for one, other in zip(out, cut, strict=True):
        torch.testing.assert_close(one, other)
    sum(out).sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad is None
    masked = linear_token_logprob(hidden, weight, torch.full((ROWS,), -100))
    masked.logprob.sum().backward()
    assert torch.equal(masked.entropy, torch.zeros(ROWS))
    assert linear_token_logprob(hidden[:0], weight, targets[:0]).lse.shape == (0,)


def test_autocast_does_not_lower_the_precision():
    hidden, weight, _, targets, _ = make_inputs()
    hidden = hidden.nan_to_num()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = linear_token_logprob(hidden, weight, targets).logprob
    assert torch.equal(lowered, linear_token_logprob(hidden, weight, targets).logprob)


@pytest.mark.slow
def test_compiles_whole():
    hidden, weight, bias, targets, mask = make_inputs()

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return linear_token_logprob(hidden, weight, targets, bias=bias, mask=mask, budget_bytes=12000)[:3]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager, traced = (results(op, hidden, weight, bias) for op in (run, compiled))
    torch.testing.assert_close(traced, eager)


def _sharded(rank: int, path: str, sizes: tuple[int, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        hidden, weight, bias, targets, mask = make_inputs()
        bias[: sizes[0]] = -torch.inf if sizes[0] < 5 else bias[: sizes[0]]
        targets = targets.clamp_min(5)
        start = sum(sizes[:rank])
        mine = slice(start, start + sizes[rank])
        options = {"temperature": TEMPERATURE, "mask": mask, "self_certainty": True, "budget_bytes": 1200}

        def whole(hidden: Tensor, weight: Tensor, bias: Tensor):
            return linear_token_logprob(hidden, weight, targets, bias=bias, **options)

        def shard(hidden: Tensor, weight: Tensor, bias: Tensor):
            return linear_token_logprob(hidden, weight, targets, bias=bias, group=dist.group.WORLD, **options)

        expected, (dhidden, dweight, dbias) = results(whole, hidden, weight, bias)
        actual, gradients = results(shard, hidden, weight[mine], bias[mine])
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)
        for one, other in zip(gradients, (dhidden, dweight[mine], dbias[mine]), strict=True):
            torch.testing.assert_close(one, other)
        with pytest.raises(ValueError, match=r"targets must be in \[0, 53\)"):
            linear_token_logprob(hidden, weight[mine], torch.full_like(targets, 53), mask=mask, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(20, 33), (3, 50)])
def test_sharded_vocabulary_matches_the_whole(tmp_path, sizes):
    mp.spawn(_sharded, args=(str(tmp_path / "store"), sizes), nprocs=2)


X, W, Y = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"hidden must be of shape \[T, D\]", {"hidden": X[0]}),
        (r"weight must be of shape \[V, D\] = \[any, 4\]", {"weight": W[:, :3]}),
        (r"weight must be of dtype float32", {"weight": W.bfloat16()}),
        (r"V >= 1", {"weight": W[:0]}),
        (r"bias must be of shape \[V\] = \[5\]", {"bias": torch.zeros(4)}),
        (r"budget_bytes must be a finite number in \[1", {"budget_bytes": 0}),
        (r"targets must be in \[0, 5\)", {"targets": Y + 5}),
        (r"mask must be of shape", {"mask": torch.ones(2, dtype=torch.bool)}),
        (r"temperature must be finite and > 0", {"temperature": torch.tensor([1.0, torch.inf, 1.0])}),
        (r"softcap must be", {"softcap": -1.0}),
        (r"backend must be one of", {"backend": "none"}),
    ],
)
def test_wrong_arguments_are_refused(message, arguments):
    with pytest.raises(ValueError, match=f"^linear_token_logprob: .*{message}"):
        linear_token_logprob(**({"hidden": X, "weight": W, "targets": Y} | arguments))
