"""The clipped loss straight from logits. N sequences, T packed tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench.harness.case import Candidate, Case, Outputs, Run, load
from bench.kernels.eager import eager_grpo_loss, eager_logprob, old_logprobs, packed_batch, peaked
from mgrpo_kernels import logits_grpo_loss

OP = "logits_grpo_loss"
# N, T, V
SHAPES = {"cpu": (4, 256, 151_936), "cuda": (8, 8_192, 151_936), "tiny": (4, 64, 1_000)}
SMALL = (3, 24, 4_099)


@dataclass(frozen=True)
class Inputs:
    """Inputs of every candidate."""

    logits: Tensor  # [T, V]
    targets: Tensor  # [T]
    old_logprob: Tensor  # [T]
    advantage: Tensor  # [T], one value a sequence
    mask: Tensor  # [T]
    cu_seqlens: Tensor  # [N+1]


def make(num: int, rows: int, vocabulary: int, dtype: torch.dtype) -> Inputs:
    """Peaked rows; about a third of the ratios is clipped."""
    torch.manual_seed(0)
    logits = peaked(rows, vocabulary).to(dtype)
    targets = torch.randint(vocabulary, (rows,))
    with torch.no_grad():
        old = torch.cat([eager_logprob(*part) for part in zip(logits.split(32), targets.split(32), strict=True)])
    advantage, mask, cu_seqlens = packed_batch(num, rows)
    return Inputs(logits.requires_grad_(), targets, old_logprobs(old), advantage, mask, cu_seqlens)


def run(inputs: Inputs, logits: Tensor, loss: Callable[[Tensor], Tensor]) -> Run:
    """Forward and backward."""

    def both() -> tuple[Tensor, Tensor]:
        value = loss(logits)
        return value.detach(), torch.autograd.grad(value, logits)[0]

    return Run(call=both, outputs=lambda out: {"loss": out[0], "dlogits": out[1]})


def apply(inputs: Inputs, logits: Tensor, backend: str) -> Tensor:
    old = inputs.old_logprob.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return logits_grpo_loss(
        logits,
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
        prepare=lambda inputs: run(inputs, inputs.logits, lambda logits: apply(inputs, logits, backend)),
    )


def oracle(inputs: Inputs) -> Outputs:
    """The reference in fp64."""
    exact = inputs.logits.detach().double().requires_grad_()
    bound = run(inputs, exact, lambda logits: apply(inputs, logits, "reference"))
    return bound.outputs(bound.call())


def composed(logprob: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs], Run]:
    """A peer's log-probs under the eager loss."""

    def prepare(inputs: Inputs) -> Run:
        return run(
            inputs,
            inputs.logits,
            lambda logits: eager_grpo_loss(
                logprob(logits, inputs.targets), inputs.old_logprob, inputs.advantage, inputs.mask
            ),
        )

    return prepare


def trl(inputs: Inputs) -> Run:
    return composed(load("trl.trainer.utils", "selective_log_softmax"))(inputs)


def verl(inputs: Inputs) -> Run:
    return composed(load("verl.utils.torch_functional", "logprobs_from_logits_v2"))(inputs)


def compiled(inputs: Inputs) -> Run:
    return composed(torch.compile(eager_logprob, dynamic=False))(inputs)


def liger(inputs: Inputs) -> Run:
    """Its sequences have one more row than tokens; the gradient overwrites the logits, which are restored."""
    function = load("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    num = inputs.cu_seqlens.shape[0] - 1
    rows, vocabulary = inputs.logits.shape
    kept = inputs.logits.detach().view(num, rows // num, vocabulary)
    padded = torch.nn.functional.pad(kept, (0, 0, 0, 1)).requires_grad_()
    old, targets = inputs.old_logprob.view(num, -1), inputs.targets.view(num, -1)
    mask, advantage = inputs.mask.view(num, -1).int(), inputs.advantage.view(num, -1)[:, 0].contiguous()

    def both() -> tuple[Tensor, Tensor]:
        value = function(
            padded, old, None, targets, advantage, mask, 1.0, 0.0, 0.2, 0.2, inplace=True, loss_type="bnpo", reduce=True
        )[0]
        return value.detach(), torch.autograd.grad(value, padded)[0]

    def restore() -> None:
        with torch.no_grad():
            padded[:, :-1].copy_(kept)

    return Run(
        call=both,
        outputs=lambda out: {"loss": out[0], "dlogits": out[1][:, :-1].reshape(rows, vocabulary)},
        restore=restore,
    )


PEERS = [
    Candidate(name="torch log_softmax, gather, the eager loss", prepare=composed(eager_logprob)),
    Candidate(name="the same with torch.compile of the log-probs", prepare=compiled, checked=False),
    Candidate(name="trl selective_log_softmax, the eager loss", package="trl", prepare=trl),
    Candidate(name="verl logprobs_from_logits_v2, the eager loss", package="verl", prepare=verl),
]


GPU_PEERS = [Candidate(name="liger triton_grpo_loss, in place", package="liger-kernel", prepare=liger)]


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, id="fp32", marks=pytest.mark.cpu_shapes), pytest.param(torch.bfloat16, id="bf16")],
)
def test_logits_grpo_loss(bench, device, scale, dtype, backend):
    """Reads the logits forward; reads them and writes their gradient backward."""
    num, rows, vocabulary = SHAPES[scale]
    bench(
        Case(
            op=OP,
            mode="forward+backward",
            dtype=str(dtype).removeprefix("torch."),
            shape=f"N={num} T={rows} V={vocabulary}",
            make=lambda: make(num, rows, vocabulary, dtype),
            make_small=lambda: make(*SMALL, dtype),
            ours=ours,
            oracle=oracle,
            peers=[*PEERS, *GPU_PEERS] if device == "cuda" else PEERS,
            reduction_length=SMALL[2],
            bytes_moved=3 * rows * vocabulary * dtype.itemsize,
            cold=True,
        ),
        backend,
    )
