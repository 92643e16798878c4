"""Log-probability and entropy from logits. T tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.case import Candidate, Case, Outputs, Run, load
from bench.kernels.eager import eager_logprob_entropy, peaked
from mgrpo_kernels import token_logprob

OP = "token_logprob"
# T, V
SHAPES = {"cpu": (256, 151_936), "cuda": (8_192, 151_936), "tiny": (16, 1_000)}
SMALL = (24, 4_099)


@dataclass(frozen=True)
class Inputs:
    """Inputs of every candidate."""

    logits: Tensor  # [T, V]
    targets: Tensor  # [T]
    dlogprob: Tensor  # [T]
    dentropy: Tensor  # [T]


def make(rows: int, vocabulary: int, dtype: torch.dtype, *, grad: bool) -> Inputs:
    """Peaked rows, random targets and upstream gradients."""
    torch.manual_seed(0)
    logits = peaked(rows, vocabulary).to(dtype)
    targets = torch.randint(vocabulary, (rows,))
    return Inputs(logits.requires_grad_(grad), targets, torch.randn(rows), torch.randn(rows))


def run(inputs: Inputs, logits: Tensor, rows: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Run:
    """Forward, and if the inputs require a gradient also the backward of both outputs."""
    if not inputs.logits.requires_grad:

        def forward() -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                return rows(logits, inputs.targets)

        return Run(call=forward, outputs=lambda out: {"logprob": out[0], "entropy": out[1]})

    def both() -> tuple[Tensor, ...]:
        out = rows(logits, inputs.targets)
        grad = torch.autograd.grad(out, logits, (inputs.dlogprob.to(out[0].dtype), inputs.dentropy.to(out[1].dtype)))
        return *(part.detach() for part in out), grad[0]

    return Run(call=both, outputs=lambda out: dict(zip(("logprob", "entropy", "dlogits"), out, strict=True)))


def run_logprob(inputs: Inputs, rows: Callable[[Tensor, Tensor], Tensor]) -> Run:
    """The same for a peer without entropy."""
    if not inputs.logits.requires_grad:

        def forward() -> Tensor:
            with torch.no_grad():
                return rows(inputs.logits, inputs.targets)

        return Run(call=forward, outputs=lambda out: {"logprob": out})

    def both() -> tuple[Tensor, Tensor]:
        out = rows(inputs.logits, inputs.targets)
        (grad,) = torch.autograd.grad(out, inputs.logits, inputs.dlogprob.to(out.dtype))
        return out.detach(), grad

    return Run(call=both, outputs=lambda out: {"logprob": out[0], "dlogits, logprob only": out[1]})


def ours(backend: str) -> Candidate:
    """The backward overwrites a copy of the logits, which is restored after each call."""

    def prepare(inputs: Inputs) -> Run:
        grad = inputs.logits.requires_grad
        logits = inputs.logits.detach().clone().requires_grad_() if grad else inputs.logits

        def rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return token_logprob(logits, targets, inplace_backward=grad, backend=backend)[:2]

        def restore() -> None:
            with torch.no_grad():
                logits.copy_(inputs.logits)

        bound = run(inputs, logits, rows)
        return Run(call=bound.call, outputs=bound.outputs, restore=restore if grad else None)

    return Candidate(name=f"ours, {backend}", prepare=prepare)


def oracle(inputs: Inputs) -> Outputs:
    """The reference in fp64."""
    exact = inputs.logits.detach().double().requires_grad_(inputs.logits.requires_grad)
    result = token_logprob(exact, inputs.targets, backend="reference")
    outputs = {"logprob": result.logprob.detach(), "entropy": result.entropy.detach()}
    if exact.requires_grad:
        upstream = (inputs.dlogprob.double(), inputs.dentropy.double())
        outputs["dlogits"] = torch.autograd.grad(result[:2], exact, upstream, retain_graph=True)[0]
        outputs["dlogits, logprob only"] = torch.autograd.grad(result.logprob, exact, upstream[0])[0]
    return outputs


def trl(inputs: Inputs) -> Run:
    both = load("trl.trainer.utils", "selective_log_softmax_and_entropy")
    return run(inputs, inputs.logits, both)


def verl(inputs: Inputs) -> Run:
    logprobs = load("verl.utils.torch_functional", "logprobs_from_logits_v2")
    entropies = load("verl.utils.torch_functional", "entropy_from_logits")
    return run(inputs, inputs.logits, lambda logits, targets: (logprobs(logits, targets), entropies(logits)))


def compiled(inputs: Inputs) -> Run:
    function: Any = torch.compile(eager_logprob_entropy, dynamic=False)
    return run(inputs, inputs.logits, function)


PEERS = [
    Candidate(name="trl selective_log_softmax + entropy_from_logits", package="trl", prepare=trl),
    Candidate(name="verl logprobs_from_logits_v2 + entropy_from_logits", package="verl", prepare=verl),
    Candidate(name="torch log_softmax, both", prepare=lambda inputs: run(inputs, inputs.logits, eager_logprob_entropy)),
    Candidate(name="torch.compile of the same", prepare=compiled, checked=False),
    Candidate(
        name="F.cross_entropy (no entropy)",
        prepare=lambda inputs: run_logprob(
            inputs, lambda logits, targets: -F.cross_entropy(logits, targets, reduction="none")
        ),
    ),
]


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, id="fp32", marks=pytest.mark.cpu_shapes), pytest.param(torch.bfloat16, id="bf16")],
)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_token_logprob(bench, scale, mode, dtype, backend):
    """Forward reads the logits once; in place, the backward reads and writes them once."""
    grad = mode != "forward"
    rows, vocabulary = SHAPES[scale]
    bench(
        Case(
            op=OP,
            mode=f"{mode}, in place" if grad else mode,
            dtype=str(dtype).removeprefix("torch."),
            shape=f"T={rows} V={vocabulary}",
            make=lambda: make(rows, vocabulary, dtype, grad=grad),
            make_small=lambda: make(*SMALL, dtype, grad=grad),
            ours=ours,
            oracle=oracle,
            peers=PEERS,
            reduction_length=SMALL[1],
            bytes_moved=rows * vocabulary * dtype.itemsize * (3 if grad else 1),
            cold=True,
        ),
        backend,
    )
