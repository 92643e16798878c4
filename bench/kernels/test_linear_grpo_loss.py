"""The clipped loss from hidden states and the head. N sequences, T packed tokens, D hidden, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench.harness.case import Candidate, Case, Outputs, Run, load
from bench.kernels.eager import eager_grpo_loss, eager_logprob, old_logprobs, packed_batch
from mgrpo_kernels import linear_grpo_loss

OP = "linear_grpo_loss"
# N, T, D, V
SHAPES = {"cpu": (4, 256, 2_560, 32_768), "cuda": (8, 8_192, 2_560, 151_936), "tiny": (4, 64, 64, 1_000)}
SMALL = (3, 24, 128, 4_099)


@dataclass(frozen=True)
class Inputs:
    """Inputs of every candidate."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [T]
    old_logprob: Tensor  # [T]
    advantage: Tensor  # [T], one value a sequence
    mask: Tensor  # [T]
    cu_seqlens: Tensor  # [N+1], sequences of equal length, so that padding adds nothing


def make(num: int, rows: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> Inputs:
    """Logits of standard deviation 4; about a third of the ratios is clipped."""
    torch.manual_seed(0)
    weight = torch.empty(vocabulary, hidden, dtype=dtype).normal_(std=4 / hidden**0.5)
    states = torch.randn(rows, hidden, dtype=dtype)
    targets = torch.randint(vocabulary, (rows,))
    old = old_logprobs(eager_logprob(states @ weight.t(), targets))
    return Inputs(states.requires_grad_(), weight.requires_grad_(), targets, old, *packed_batch(num, rows))


def run(operands: tuple[Tensor, Tensor], loss: Callable[[Tensor, Tensor], Tensor]) -> Run:
    """Forward and backward."""

    def both() -> tuple[Tensor, ...]:
        value = loss(*operands)
        return value.detach(), *torch.autograd.grad(value, operands)

    return Run(call=both, outputs=lambda out: dict(zip(("loss", "dhidden", "dweight"), out, strict=True)))


def apply(inputs: Inputs, hidden: Tensor, weight: Tensor, backend: str) -> Tensor:
    old = inputs.old_logprob.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    return linear_grpo_loss(
        hidden,
        weight,
        inputs.targets,
        inputs.advantage,
        inputs.mask,
        old_logprob=old,
        cu_seqlens=inputs.cu_seqlens,
        backend=backend,
    ).loss


def ours(backend: str) -> Candidate:
    return Candidate(
        name=f"ours, {backend}",
        prepare=lambda inputs: run(
            (inputs.hidden, inputs.weight), lambda hidden, weight: apply(inputs, hidden, weight, backend)
        ),
    )


def oracle(inputs: Inputs) -> Outputs:
    """The reference in fp64."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (inputs.hidden, inputs.weight))
    bound = run((hidden, weight), lambda *both: apply(inputs, *both, backend="reference"))
    return bound.outputs(bound.call())


def naive(inputs: Inputs) -> Run:
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logprob = eager_logprob(torch.mm(hidden, weight.t()), inputs.targets)
        return eager_grpo_loss(logprob, inputs.old_logprob, inputs.advantage, inputs.mask)

    return run((inputs.hidden, inputs.weight), loss)


def trl(inputs: Inputs) -> Run:
    function = load("trl.kernels", "ChunkedLogProbFunction")
    chunk = load("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logprob = function.apply(hidden, weight, None, inputs.targets, 1.0, chunk, None, 1.0, ())[0]
        return eager_grpo_loss(logprob, inputs.old_logprob, inputs.advantage, inputs.mask)

    return run((inputs.hidden, inputs.weight), loss)


def verl(inputs: Inputs) -> Run:
    function = load("verl.utils.experimental.torch_functional", "FusedLinearForPPO")()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logprob = function(hidden, weight, inputs.targets)[0]
        return eager_grpo_loss(logprob, inputs.old_logprob, inputs.advantage, inputs.mask)

    return run((inputs.hidden, inputs.weight), loss)


def liger(chunk_size: int | None) -> Callable[[Inputs], Run]:
    """Its sequences are padded to [N, L]; it chunks them, and compiles on a GPU by default."""

    def prepare(inputs: Inputs) -> Run:
        num = inputs.cu_seqlens.shape[0] - 1
        module = load("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")(
            beta=0.0,
            compiled=inputs.hidden.is_cuda,
            use_ref_model=False,
            chunk_size=chunk_size or num,
            loss_type="bnpo",
        )

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            return module(
                hidden.view(num, -1, hidden.shape[1]),
                weight,
                inputs.targets.view(num, -1),
                inputs.mask.view(num, -1).long(),
                inputs.advantage.view(num, -1)[:, 0],
                old_per_token_logps=inputs.old_logprob.view(num, -1),
            )[0]

        return run((inputs.hidden, inputs.weight), loss)

    return prepare


PEERS = [
    Candidate(name="torch mm, float, log_softmax, the eager loss", prepare=naive),
    Candidate(name="trl ChunkedLogProbFunction, the eager loss", package="trl", prepare=trl),
    Candidate(name="verl FusedLinearForPPO, the eager loss", package="verl", prepare=verl),
    Candidate(name="liger LigerFusedLinearGRPOLoss", package="liger-kernel", prepare=liger(1)),
    Candidate(name="liger LigerFusedLinearGRPOLoss, one chunk", package="liger-kernel", prepare=liger(None)),
]


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float32, id="fp32", marks=pytest.mark.cpu_shapes)],
)
def test_linear_grpo_loss(bench, scale, dtype, backend):
    """6 T D V FLOP forward and backward."""
    num, rows, hidden, vocabulary = SHAPES[scale]
    bench(
        Case(
            op=OP,
            mode="forward+backward",
            dtype=str(dtype).removeprefix("torch."),
            shape=f"N={num} T={rows} D={hidden} V={vocabulary}" + (" (a slice)" if scale == "cpu" else ""),
            make=lambda: make(num, rows, hidden, vocabulary, dtype),
            make_small=lambda: make(*SMALL, dtype),
            ours=ours,
            oracle=oracle,
            peers=PEERS,
            reduction_length=SMALL[3],
            flop=6 * rows * hidden * vocabulary,
            cold=True,
        ),
        backend,
    )
