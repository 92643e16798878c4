from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mgrpo_kernels import trajectory_entropy
from mgrpo_kernels.testing import assert_mutants_rejected, assert_within_budget, poison_masked

LENGTHS = [3, 0, 7, 1, 12]
CU_SEQLENS = torch.tensor([0, 3, 3, 10, 11, 23], dtype=torch.int32)


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


def test_matches_a_loop_and_rejects_every_mutant():
    assert_mutants_rejected(trajectory_entropy, check, without=("wrong_temperature",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_accumulates_in_fp32_or_fp64(dtype):
    tokens = torch.full((4000,), 1.0 / 3).to(dtype)
    total = trajectory_entropy(tokens, cu_seqlens=torch.tensor([0, 4000]), reduce="sum")
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(total.double(), tokens.double().sum()[None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_gradients(reduce):
    tokens = make_tokens().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: trajectory_entropy(x, cu_seqlens=CU_SEQLENS, reduce=reduce), tokens)
    values, mask = padded(make_tokens())
    leaf = poison_masked(values, mask).requires_grad_()
    upstream = torch.arange(1.0, 6.0)
    (trajectory_entropy(leaf, mask=mask, reduce=reduce) * upstream).sum().backward()
    counts = torch.tensor(LENGTHS).clamp_min(1) if reduce == "mean" else torch.ones(5)
    assert torch.equal(leaf.grad, torch.where(mask, (upstream / counts)[:, None], 0))


def test_no_sequences_and_no_tokens():
    assert trajectory_entropy(torch.zeros(0), cu_seqlens=torch.tensor([0])).shape == (0,)
    assert trajectory_entropy(torch.zeros(0), cu_seqlens=torch.tensor([0, 0, 0])).tolist() == [0.0, 0.0]
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert trajectory_entropy(torch.full((2, 3), torch.nan), mask=nothing).tolist() == [0.0, 0.0]


def test_compiles_whole():
    tokens = make_tokens()
    compiled = torch.compile(
        lambda x: trajectory_entropy(x, cu_seqlens=CU_SEQLENS), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(tokens), trajectory_entropy(tokens, cu_seqlens=CU_SEQLENS))


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
def test_wrong_arguments_are_refused(message, arguments):
    with pytest.raises(ValueError, match=f"^trajectory_entropy: {message}"):
        trajectory_entropy(**({"token_entropy": make_tokens(), "cu_seqlens": CU_SEQLENS} | arguments))
