"""A second derivative is right or refused, on every backend; letters: see the package."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mgrpo_kernels as K

BACKENDS = [name for name, state in K.backends().items() if state.available]
REFUSED = r"^\w+: the gradient must be differentiated once, got a second backward through it\. .*\.$"
T, V, D, N = 6, 9, 4, 2
Op = Callable[[Tensor, str], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TARGETS = torch.arange(T) * 5 % V
MASK = torch.arange(T) != 2
CUTS = torch.tensor([0, 4, T])
REST = {"advantage": torch.tensor([1.5, -0.5]), "mask": MASK, "cu_seqlens": CUTS}
WEIGHT, HIDDEN = normal(V, D, seed=1), normal(T, D, seed=2)


def rows(output: str, **options: Any) -> Op:
    return lambda x, backend: getattr(K.token_logprob(x, TARGETS, backend=backend, **options), output).sum()


def head(x: Tensor, backend: str, **options: Any) -> K.TokenLogprob:
    hidden, weight = (x, WEIGHT) if x.shape[0] == T else (HIDDEN, x)
    return K.linear_token_logprob(hidden, weight, TARGETS, backend=backend, **options)


# For each input that takes a gradient a 0-d loss of it.
OPS: dict[str, tuple[tuple[int, ...], Op]] = {
    "token_logprob": ((T, V), rows("logprob")),
    "token_logprob, entropy": ((T, V), rows("entropy", mask=MASK, temperature=0.7, softcap=5.0)),
    "token_logprob, lse": ((T, V), rows("lse", temperature=torch.full((T,), 0.9))),
    "token_logprob, self-certainty": ((T, V), rows("self_certainty", self_certainty=True)),
    "token_logprob, in place": ((T, V), rows("logprob", inplace_backward=True)),
    "linear_token_logprob, hidden": ((T, D), lambda x, b: head(x, b).logprob.sum()),
    "linear_token_logprob, masked": ((T, D), lambda x, b: head(x, b, mask=MASK).entropy.sum()),
    "linear_token_logprob, weight": ((V, D), lambda x, b: head(x, b).logprob.sum()),
    "linear_token_logprob, bias": ((V,), lambda x, b: head(HIDDEN, b, bias=x).logprob.sum()),
    "grpo_loss": ((T,), lambda x, b: K.grpo_loss(x, **REST, backend=b).loss),
    "grpo_loss, old": ((T,), lambda x, b: K.grpo_loss(x, **REST, old_logprob=x.detach() + 0.1, backend=b).loss),
    "grpo_loss, sequence": ((T,), lambda x, b: K.grpo_loss(x, **REST, ratio="sequence", backend=b).loss),
    "grpo_loss, entropy": (
        (T,),
        lambda x, b: K.grpo_loss(normal(T), **REST, entropy=x, entropy_coef=0.1, backend=b).loss,
    ),
    "logits_grpo_loss": ((T, V), lambda x, b: K.logits_grpo_loss(x, TARGETS, **REST, backend=b).loss),
    "logits_grpo_loss, sequence": (
        (T, V),
        lambda x, b: K.logits_grpo_loss(x, TARGETS, **REST, ratio="sequence", backend=b).loss,
    ),
    "linear_grpo_loss, hidden": ((T, D), lambda x, b: K.linear_grpo_loss(x, WEIGHT, TARGETS, **REST, backend=b).loss),
    "linear_grpo_loss, weight": ((V, D), lambda x, b: K.linear_grpo_loss(HIDDEN, x, TARGETS, **REST, backend=b).loss),
}
each = pytest.mark.parametrize("op", OPS)
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)


def leaf_and_gradient(op: str, backend: str, power: int = 1, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A leaf, a loss of it and the gradient in which a graph was asked for; power 2: of the loss's square."""
    shape, run = OPS[op]
    leaf = normal(*shape, seed=3).requires_grad_()
    # In place an input is written over that a product has made.
    loss = run(leaf * 1.0, backend) ** power
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True, **options)
    return leaf, loss, gradient


@each
@on_each_backend
@pytest.mark.parametrize("power", [1, 2], ids=["constant upstream", "differentiable upstream"])
def test_refuses_a_second_backward(op, backend, power):
    leaf, loss, gradient = leaf_and_gradient(op, backend, power)
    penalty = gradient.square().sum()
    with pytest.raises(RuntimeError, match=REFUSED):
        penalty.backward(retain_graph=True)
    # Only the way to the leaf is walked, where the error must lie.
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(penalty, leaf, allow_unused=True, retain_graph=True)
    others = leaf.square().sum() if "in place" in op else loss
    with pytest.raises(RuntimeError, match=REFUSED):
        (others + penalty).backward()


@each
@on_each_backend
def test_a_graph_that_is_not_used_costs_nothing_and_changes_nothing(op, backend):
    shape, run = OPS[op]
    plain = normal(*shape, seed=3).requires_grad_()
    run(plain * 1.0, backend).backward()
    graph = normal(*shape, seed=3).requires_grad_()
    run(graph * 1.0, backend).backward(create_graph=True)
    assert plain.grad is not None and graph.grad is not None and torch.equal(plain.grad, graph.grad)
    torch.nn.utils.clip_grad_norm_([graph], 1e-3)
    torch.optim.SGD([graph], lr=0.1).step()
    _, _, gradient = leaf_and_gradient(op, backend)
    assert torch.equal(gradient, plain.grad) and gradient.requires_grad
    assert gradient.square().sum().item() == plain.grad.square().sum().item()
    gradient.mul_(2)


@on_each_backend
def test_what_does_not_depend_on_the_gradient_goes_on(backend):
    leaf, loss, gradient = leaf_and_gradient("token_logprob", backend)
    other = torch.ones(3, requires_grad=True)
    (found,) = torch.autograd.grad(gradient.square().sum() * other.sum(), other, retain_graph=True)
    assert torch.equal(found, gradient.detach().square().sum().expand(3))
    (again,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(again, gradient)


@on_each_backend
def test_upstream_that_alone_is_differentiated(backend):
    """The gradient is linear in what comes from above: that derivative is refused too."""
    scale = torch.ones((), requires_grad=True)
    leaf = normal(T, V).requires_grad_()
    loss = K.token_logprob(leaf, TARGETS, backend=backend).logprob.sum() * scale
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(gradient.sum(), scale)


@on_each_backend
def test_recomputed_activations(backend):
    """Checkpointing hands saved tensors out once for each backward."""
    leaf = normal(T, V).requires_grad_()

    def run(x: Tensor) -> Tensor:
        scores = K.token_logprob(x * 1.0, TARGETS, backend=backend)
        return K.grpo_loss(scores.logprob, **REST, backend=backend).loss

    (want,) = torch.autograd.grad(run(leaf), leaf)
    loss = checkpoint(run, leaf, use_reentrant=False)
    assert isinstance(loss, Tensor)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert torch.equal(gradient, want)
    with pytest.raises(RuntimeError):
        (loss + gradient.square().sum()).backward()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("cpu", "reference")])
@pytest.mark.parametrize("op", ["token_logprob", "grpo_loss", "logits_grpo_loss", "linear_token_logprob, hidden"])
def test_compiled_graphs_refuse_too(op, backend):
    shape, run = OPS[op]
    leaf = normal(*shape, seed=3).requires_grad_()
    loss = torch.compile(run, backend="aot_eager", fullgraph=True)(leaf, backend)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    torch.testing.assert_close(gradient.detach(), leaf_and_gradient(op, backend)[2].detach())
    with pytest.raises(RuntimeError, match="double backward"):
        (loss + gradient.square().sum()).backward()


LAYOUTS = {
    "packed": ((T,), {"cu_seqlens": CUTS}),
    "padded": ((N, T), {"mask": torch.stack([MASK, torch.arange(T) < 3])}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_trajectory_entropy_has_derivatives_of_any_order(layout, reduce):
    shape, options = LAYOUTS[layout]
    exact = normal(*shape).double().requires_grad_()

    def cubed(x: Tensor, backend: str) -> Tensor:
        return K.trajectory_entropy(x, **options, reduce=reduce, backend=backend) ** 3

    assert torch.autograd.gradcheck(lambda x: cubed(x, "reference"), exact)
    assert torch.autograd.gradgradcheck(lambda x: cubed(x, "reference"), exact)
    for backend in BACKENDS:
        leaf = exact.detach().float().requires_grad_()
        got, want = cubed(leaf, backend), cubed(exact, "reference")
        for _ in range(3):
            (got,) = torch.autograd.grad(got.square().sum(), leaf, create_graph=True)
            (want,) = torch.autograd.grad(want.square().sum(), exact, create_graph=True)
            torch.testing.assert_close(got.detach(), want.detach().float(), rtol=1e-4, atol=1e-5)


@on_each_backend
def test_results_without_a_gradient_say_so(backend):
    rewards = normal(2, 4).requires_grad_()
    kept = K.iqr_filter(rewards, backend=backend)
    for output in (K.group_advantage(rewards, backend=backend), kept.q1, kept.q3):
        assert not output.requires_grad


def test_every_autograd_function_of_the_package_is_known_here():
    """A new one needs `once`, or a backward that is itself differentiable, and its line in these tests."""
    found = set()
    for module in pkgutil.walk_packages(K.__path__, "mgrpo_kernels."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(cls, torch.autograd.Function) and cls.__module__.startswith("mgrpo_kernels"):
                found.add(f"{cls.__module__.removeprefix('mgrpo_kernels.')}.{cls.__name__}")
    refuse = {
        f"{op}.{kind}._{name}"
        for op, name in (("token_logprob", "TokenLogprob"), ("linear_token_logprob", "LinearTokenLogprob"))
        for kind in ("autograd", "reference")
    } | {
        "grpo_loss.autograd._GrpoLoss",
        "grpo_loss.autograd._LogitsGrpoLoss",
        "_common.once._Refusal",
        "_common.once._Input",
    }
    linear = {f"trajectory_entropy.autograd.{name}" for name in ("_TrajectoryEntropy", "_Spread")}
    linear |= {"_common.segments._SegmentSum"}
    assert found == refuse | linear | {"testing._RoundedGradient"}
