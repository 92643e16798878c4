"""Clipped policy-gradient losses. N sequences, L padded length, T packed tokens, D hidden, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness.case import Candidate, Case, Outputs, Run, load
from bench.kernels.eager import eager_grpo_loss
from mgrpo_kernels import grpo_loss

OP = "grpo_loss"
N, L = 64, 1_024
SMALL = (5, 37)
DUAL_CLIP, KL_COEF, ENTROPY_COEF = 3.0, 0.04, 0.01


@dataclass(frozen=True)
class Inputs:
    """Token tensors [N, L], nats; the loss is differentiated by logprob, and by entropy where used."""

    logprob: Tensor
    old_logprob: Tensor
    ref_logprob: Tensor
    rollout_logprob: Tensor
    entropy: Tensor
    advantage: Tensor  # [N]
    mask: Tensor

    def double(self) -> Inputs:
        """The same numbers in fp64."""
        names = ("logprob", "old_logprob", "ref_logprob", "rollout_logprob", "entropy", "advantage")
        exact: dict[str, Any] = {name: getattr(self, name).detach().double() for name in names}
        exact |= {name: exact[name].requires_grad_() for name in ("logprob", "entropy")}
        return replace(self, **exact)


def make(num: int, length: int) -> Inputs:
    """Ratios on both sides of the clip; lengths from half of L to L."""
    torch.manual_seed(0)
    logprob = -torch.rand(num, length) * 3
    old, ref, rollout = (logprob + 0.3 * torch.randn(num, length) for _ in range(3))
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (num, 1))
    entropy = torch.rand(num, length) * 2
    return Inputs(logprob.requires_grad_(), old, ref, rollout, entropy.requires_grad_(), torch.randn(num), mask)


def run(wanted: tuple[Tensor, ...], loss: Callable[[], Tensor]) -> Run:
    """Forward and backward."""

    def both() -> tuple[Tensor, ...]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, wanted)

    return Run(call=both, outputs=lambda out: dict(zip(("loss", "dlogprob", "dentropy"), out, strict=False)))


def clipped(inputs: Inputs, backend: str) -> Run:
    def loss() -> Tensor:
        return grpo_loss(
            inputs.logprob,
            inputs.advantage,
            inputs.mask,
            old_logprob=inputs.old_logprob,
            dual_clip=DUAL_CLIP,
            backend=backend,
        ).loss

    return run((inputs.logprob,), loss)


def with_kl(inputs: Inputs, backend: str) -> Run:
    def loss() -> Tensor:
        return grpo_loss(
            inputs.logprob,
            inputs.advantage,
            inputs.mask,
            old_logprob=inputs.old_logprob,
            ref_logprob=inputs.ref_logprob,
            kl_coef=KL_COEF,
            backend=backend,
        ).loss

    return run((inputs.logprob,), loss)


def everything(inputs: Inputs, backend: str) -> Run:
    def loss() -> Tensor:
        return grpo_loss(
            inputs.logprob,
            inputs.advantage,
            inputs.mask,
            old_logprob=inputs.old_logprob,
            ref_logprob=inputs.ref_logprob,
            rollout_logprob=inputs.rollout_logprob,
            entropy=inputs.entropy,
            kl_coef=KL_COEF,
            entropy_coef=ENTROPY_COEF,
            backend=backend,
        ).loss

    return run((inputs.logprob, inputs.entropy), loss)


def eager(inputs: Inputs, wanted: tuple[Tensor, ...], function: Any, **options: Any) -> Run:
    return run(
        wanted,
        lambda: function(inputs.logprob, inputs.old_logprob, inputs.advantage[:, None], inputs.mask, **options),
    )


def eager_clipped(inputs: Inputs, function: Any = eager_grpo_loss) -> Run:
    return eager(inputs, (inputs.logprob,), function, dual_clip=DUAL_CLIP)


def eager_with_kl(inputs: Inputs, function: Any = eager_grpo_loss) -> Run:
    return eager(inputs, (inputs.logprob,), function, ref_logprob=inputs.ref_logprob, kl_coef=KL_COEF)


def eager_everything(inputs: Inputs, function: Any = eager_grpo_loss) -> Run:
    return eager(
        inputs,
        (inputs.logprob, inputs.entropy),
        function,
        ref_logprob=inputs.ref_logprob,
        rollout_logprob=inputs.rollout_logprob,
        entropy=inputs.entropy,
        kl_coef=KL_COEF,
        entropy_coef=ENTROPY_COEF,
    )


def verl(inputs: Inputs) -> Run:
    function = load("verl.trainer.ppo.core_algos", "compute_policy_loss")
    advantage = inputs.advantage[:, None].expand_as(inputs.logprob)

    def loss() -> Tensor:
        return function(
            inputs.old_logprob, inputs.logprob, advantage, inputs.mask, cliprange=0.2, clip_ratio_c=DUAL_CLIP
        )[0]

    return run((inputs.logprob,), loss)


def liger(inputs: Inputs) -> Run:
    function = load("liger_kernel.chunked_loss.grpo_loss", "LigerFusedLinearGRPOFunction").ppo_loss_fn

    def loss() -> Tensor:
        return function(
            inputs.logprob,
            inputs.mask,
            inputs.advantage,
            inputs.mask,
            ref_per_token_logps=inputs.ref_logprob,
            old_per_token_logps=inputs.old_logprob,
            beta=KL_COEF,
            loss_type="bnpo",
        )[0]

    return run((inputs.logprob,), loss)


def pair(prepare: Callable[..., Run]) -> list[Candidate]:
    """The eager expression, and torch.compile of it."""

    def compiled(inputs: Inputs) -> Run:
        return prepare(inputs, torch.compile(eager_grpo_loss, dynamic=False))

    return [
        Candidate(name="torch, the eager expression", prepare=prepare),
        Candidate(name="torch.compile of it", prepare=compiled, checked=False),
    ]


# mode: ours, peers, fp32 token tensors read or written forward and backward
MODES: dict[str, tuple[Callable[[Inputs, str], Run], list[Candidate], int]] = {
    "dual clip": (
        clipped,
        [*pair(eager_clipped), Candidate(name="verl compute_policy_loss", package="verl", prepare=verl)],
        3,
    ),
    "k3": (
        with_kl,
        [*pair(eager_with_kl), Candidate(name="liger ppo_loss_fn", package="liger-kernel", prepare=liger)],
        4,
    ),
    "k3, tis, entropy": (everything, pair(eager_everything), 7),
}


@pytest.mark.parametrize("mode", MODES)
def test_grpo_loss(bench, mode, backend):
    """64 k padded tokens; every candidate also masks, and ours also returns seven metrics."""
    ours, peers, num_tensors = MODES[mode]

    def oracle(inputs: Inputs) -> Outputs:
        exact = ours(inputs.double(), "reference")
        return exact.outputs(exact.call())

    bench(
        Case(
            op=OP,
            mode=f"{mode}, forward+backward",
            dtype="float32",
            shape=f"N={N} L={L}",
            make=lambda: make(N, L),
            make_small=lambda: make(*SMALL),
            ours=lambda name: Candidate(name=f"ours, {name}", prepare=lambda inputs: ours(inputs, name)),
            oracle=oracle,
            peers=peers,
            reduction_length=SMALL[0] * SMALL[1],
            bytes_moved=N * L * (4 * num_tensors + 1),
            launch_bound=True,
        ),
        backend,
    )
