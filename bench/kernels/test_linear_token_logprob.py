"""Log-probability and entropy from hidden states and the head. T tokens, D hidden, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.case import Candidate, Case, NotInstalledError, Outputs, Run, load
from bench.kernels.eager import eager_logprob_entropy
from mgrpo_kernels import linear_token_logprob

OP = "linear_token_logprob"
# T, D, V
SHAPES = {"cpu": (256, 2_560, 151_936), "cuda": (8_192, 2_560, 151_936), "tiny": (16, 64, 1_000)}
# Torch's chunked op reads the whole head for each chunk of 8 tokens: a vocabulary that takes it seconds.
V_SLICE = 16_384
SMALL = (24, 128, 4_099)


@dataclass(frozen=True)
class Inputs:
    """Inputs of every candidate."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [T]
    dlogprob: Tensor  # [T]
    dentropy: Tensor  # [T]


def make(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, *, grad: bool) -> Inputs:
    """Logits of standard deviation 4, so that rows are peaked."""
    torch.manual_seed(0)
    weight = torch.empty(vocabulary, hidden, dtype=dtype).normal_(std=4 / hidden**0.5)
    return Inputs(
        torch.randn(rows, hidden, dtype=dtype).requires_grad_(grad),
        weight.requires_grad_(grad),
        torch.randint(vocabulary, (rows,)),
        torch.randn(rows),
        torch.randn(rows),
    )


def run(inputs: Inputs, rows: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> Run:
    """Forward, and if the inputs require gradients also the backward of all that `rows` returns."""
    operands = (inputs.hidden, inputs.weight)
    if not inputs.hidden.requires_grad:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return rows(*operands, inputs.targets)

        return Run(call=forward, outputs=lambda out: dict(zip(("logprob", "entropy"), out, strict=False)))

    def both() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        out = rows(*operands, inputs.targets)
        upstream = [grad.to(part.dtype) for grad, part in zip((inputs.dlogprob, inputs.dentropy), out, strict=False)]
        grads = torch.autograd.grad(out, operands, upstream)
        return tuple(part.detach() for part in out), grads

    def outputs(result: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]) -> Outputs:
        out, grads = result
        suffix = "" if len(out) == 2 else ", logprob only"
        return {
            **dict(zip(("logprob", "entropy"), out, strict=False)),
            f"dhidden{suffix}": grads[0],
            f"dweight{suffix}": grads[1],
        }

    return Run(call=both, outputs=outputs)


def ours(backend: str) -> Candidate:
    return Candidate(
        name=f"ours, {backend}",
        prepare=lambda inputs: run(
            inputs, lambda *operands: linear_token_logprob(operands[0], operands[1], operands[2], backend=backend)[:2]
        ),
    )


def oracle(inputs: Inputs) -> Outputs:
    """The reference in fp64."""
    grad = inputs.hidden.requires_grad
    exact = [tensor.detach().double().requires_grad_(grad) for tensor in (inputs.hidden, inputs.weight)]
    result = linear_token_logprob(exact[0], exact[1], inputs.targets, backend="reference")
    outputs = {"logprob": result.logprob.detach(), "entropy": result.entropy.detach()}
    if grad:
        upstream = (inputs.dlogprob.double(), inputs.dentropy.double())
        both = torch.autograd.grad(result[:2], exact, upstream, retain_graph=True)
        alone = torch.autograd.grad(result.logprob, exact, upstream[0])
        outputs |= dict(zip(("dhidden", "dweight"), both, strict=True))
        outputs |= dict(zip(("dhidden, logprob only", "dweight, logprob only"), alone, strict=True))
        result = linear_token_logprob(exact[0], exact[1], inputs.targets, backend="reference")
        outputs |= dict(
            zip(("dhidden, nll", "dweight, nll"), torch.autograd.grad(-result.logprob.sum(), exact), strict=True)
        )
    return {**outputs, **nll(outputs)}


def nll(outputs: Outputs) -> Outputs:
    """The negative sum of log-probs, the result of a loss without a value for each row."""
    return {"nll": -outputs["logprob"].sum()}


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
    """The loss as most trainers write it."""
    return (-F.cross_entropy(torch.mm(hidden, weight.t()).float(), targets, reduction="none"),)


def naive_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return eager_logprob_entropy(torch.mm(hidden, weight.t()), targets)


def trl(inputs: Inputs) -> Run:
    function = load("trl.kernels", "ChunkedLogProbFunction")
    chunk = load("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")

    def rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return function.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("entropy",))[:2]

    return run(inputs, rows)


def verl(inputs: Inputs) -> Run:
    return run(inputs, load("verl.utils.experimental.torch_functional", "FusedLinearForPPO")())


def liger(inputs: Inputs) -> Run:
    base = load("liger_kernel.chunked_loss.fused_linear_ppo", "LigerFusedLinearPPOBase")

    def rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
        return (base.chunk_forward(hidden[None], weight, targets[None])[0],)

    return run(inputs, rows)


def torch_chunked(inputs: Inputs) -> Run:
    if not hasattr(F, "linear_cross_entropy"):
        raise NotInstalledError("a torch that has it")
    options: Any = load("torch.nn", "LinearCrossEntropyOptions")()

    def rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
        return (-F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options),)

    return run(inputs, rows)


def liger_fused(inputs: Inputs) -> Run:
    """One log-prob for each row; the backward computes the logits again."""
    function = load("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    return run(inputs, lambda *operands: (-function(*operands, reduction="none"),))


def liger_sum(inputs: Inputs) -> Run:
    """Its fast path: only the sum, whose gradients are computed in the forward."""
    function = load("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    operands = (inputs.hidden, inputs.weight)

    def both() -> tuple[Tensor, ...]:
        loss = function(*operands, inputs.targets, reduction="sum")
        if not inputs.hidden.requires_grad:
            return (loss,)
        return loss.detach(), *torch.autograd.grad(loss, operands)

    return Run(call=both, outputs=lambda out: dict(zip(("nll", "dhidden, nll", "dweight, nll"), out, strict=False)))


def cut_cross_entropy(inputs: Inputs) -> Run:
    function = load("cut_cross_entropy", "linear_cross_entropy")
    return run(inputs, lambda *operands: (-function(*operands, reduction="none"),))


def verl_kernel(inputs: Inputs) -> Run:
    function = load("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")

    def rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(function(hidden, weight, targets, 1.0, "none")[:2])

    return run(inputs, rows)


PEERS = [
    Candidate(name="torch mm, float, cross_entropy (no entropy)", prepare=lambda inputs: run(inputs, naive)),
    Candidate(name="torch mm, float, log_softmax, both", prepare=lambda inputs: run(inputs, naive_entropy)),
    Candidate(name="trl ChunkedLogProbFunction", package="trl", prepare=trl),
    Candidate(name="verl FusedLinearForPPO", package="verl", prepare=verl),
    Candidate(name="liger chunk_forward (no entropy)", package="liger-kernel", prepare=liger),
]
TORCH_CHUNKED = Candidate(name="F.linear_cross_entropy(options) (no entropy)", prepare=torch_chunked)

GPU_PEERS = [
    Candidate(name="liger fused_linear_cross_entropy, a row (no entropy)", package="liger-kernel", prepare=liger_fused),
    Candidate(name="liger fused_linear_cross_entropy, sum (no entropy)", package="liger-kernel", prepare=liger_sum),
    Candidate(
        name="cut_cross_entropy linear_cross_entropy (no entropy)",
        package="cut-cross-entropy",
        prepare=cut_cross_entropy,
    ),
    Candidate(name="verl kernel linear_cross_entropy", package="verl", prepare=verl_kernel),
    TORCH_CHUNKED,
]


@pytest.mark.parametrize(
    ("cut", "dtype"),
    [
        pytest.param(V_SLICE, torch.bfloat16, id="slice-bf16", marks=pytest.mark.cpu_shapes),
        pytest.param(None, torch.bfloat16, id="full-bf16"),
        pytest.param(None, torch.float32, id="full-fp32", marks=pytest.mark.cpu_shapes),
    ],
)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_linear_token_logprob(bench, device, scale, slow_peers, mode, cut, dtype, backend):
    """2 T D V FLOP forward, 4 T D V more for both gradients."""
    grad = mode != "forward"
    num, hidden, full = SHAPES[scale]
    vocabulary = cut or full
    peers = [*PEERS, TORCH_CHUNKED] if cut or slow_peers else PEERS
    if device == "cuda":
        peers = [*PEERS, *GPU_PEERS]
    bench(
        Case(
            op=OP,
            mode=mode,
            dtype=str(dtype).removeprefix("torch."),
            shape=f"T={num} D={hidden} V={vocabulary}" + (" (a slice)" if cut else ""),
            make=lambda: make(num, hidden, vocabulary, dtype, grad=grad),
            make_small=lambda: make(*SMALL, dtype, grad=grad),
            ours=ours,
            oracle=oracle,
            peers=peers,
            reduction_length=SMALL[2],
            flop=2 * num * hidden * vocabulary * (3 if grad else 1),
            cold=True,
            derived=nll,
        ),
        backend,
    )
