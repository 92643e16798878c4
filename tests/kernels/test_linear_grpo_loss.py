from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from mgrpo_kernels import linear_grpo_loss, logits_grpo_loss
from mgrpo_kernels.linear_token_logprob import products
from mgrpo_kernels.testing import assert_within_budget

TOKENS, HIDDEN, VOCABULARY = 9, 3, 48
CU_SEQLENS = torch.tensor([0, 4, 9])
ADVANTAGE = torch.tensor([1.3, -0.7])
OPTIONS = {"cu_seqlens": CU_SEQLENS, "entropy_coef": 0.2, "clip_low": 0.1, "kl_coef": 0.3}
UPSTREAM = 0.7


def make_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator) + weight[targets]
    mask = torch.arange(TOKENS) % 4 != 1
    near = (hidden @ weight.T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    noise = 0.2 * torch.randn(2, TOKENS, generator=generator)
    rest = {"targets": targets, "mask": mask, "old_logprob": near + noise[0], "ref_logprob": near + noise[1]}
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), **rest}


def gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, torch.tensor(UPSTREAM, dtype=loss.dtype), retain_graph=True)


def whole_logits(inputs: dict[str, Tensor], to: torch.dtype) -> tuple[Tensor, ...]:
    """Loss and gradients from the logits as a whole, whose own gradient is rounded as the inputs are."""
    leaves = [inputs[name].to(to).requires_grad_() for name in ("hidden", "weight")]
    rest = {name: inputs[name] for name in ("targets", "mask", "old_logprob", "ref_logprob")}
    logits = leaves[0] @ leaves[1].T
    if to == torch.float32:
        logits.register_hook(lambda dlogits: dlogits.to(inputs["hidden"].dtype).to(to))
    loss = logits_grpo_loss(logits, advantage=ADVANTAGE, backend="reference", **rest, **OPTIONS).loss
    return loss.detach(), *gradients(loss, leaves)


# Everything is kept in fp32, or in 16 bits, or nothing is.
@pytest.mark.parametrize(("budget", "num_products"), [(4000, 3), (1400, 3), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_fit_are_multiplied_once(monkeypatch, dtype, budget, num_products):
    if dtype == torch.float32 and budget == 1400:
        num_products = 3.25  # of 48 columns 36 are kept
    flop, product = 0, products._product

    def count(a: Tensor, b: Tensor) -> Tensor:
        nonlocal flop
        flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return product(a, b)

    monkeypatch.setattr(products, "_product", count)
    inputs = make_inputs(dtype)
    leaves = [inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()]
    loss = linear_grpo_loss(advantage=ADVANTAGE, budget_bytes=budget, backend="triton", **inputs, **OPTIONS).loss
    found = gradients(loss, leaves)
    rows = int(inputs["mask"].sum())  # this CPU counts them
    assert flop == num_products * 2 * rows * HIDDEN * VOCABULARY
    assert all(torch.equal(first, again) for first, again in zip(found, gradients(loss, leaves), strict=True))
    exact, near = (whole_logits(inputs, to) for to in (torch.float64, torch.float32))
    for name, actual, oracle, rounded in zip(("loss", "dhidden", "dweight"), (loss, *found), exact, near, strict=True):
        if dtype == torch.bfloat16 and name != "loss":
            rounded = rounded.to(dtype)
        sizes = {"reduction_length": VOCABULARY * HIDDEN * TOKENS, "largest_term": 1.0}
        assert_within_budget(actual.detach(), oracle, rounded, what=name, **sizes)


def test_rows_that_a_mask_on_the_cpu_removes_enter_no_product():
    """With tensors without data in the place of a GPU's."""
    rows = []

    class Rows(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "linear" in str(func):
                rows.append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    inputs = {name: tensor.to("meta") for name, tensor in make_inputs(torch.float32).items()}
    options = OPTIONS | {"cu_seqlens": CU_SEQLENS.to("meta"), "advantage": ADVANTAGE.to("meta")}
    inputs["hidden"].requires_grad_()
    mask = make_inputs(torch.float32)["mask"]
    for backend in ("triton", "reference"):
        with Rows():
            linear_grpo_loss(**(inputs | {"mask": mask}), **options, backend=backend).loss.backward()
    assert rows == [int(mask.sum())] * 2 and inputs["hidden"].grad.shape == (TOKENS, HIDDEN)
    with pytest.raises(ValueError, match=r"^linear_grpo_loss: mask must be of shape \[T\] = \[9\]"):
        linear_grpo_loss(**(inputs | {"mask": mask[1:]}), **options)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_weight_that_is_distributed_gets_its_gradient_alike(tmp_path, backend):
    inputs = make_inputs(torch.float32)
    found = []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for weight in (inputs["weight"], DTensor.from_local(inputs["weight"], mesh, [Shard(0)])):
            leaf = weight.detach().requires_grad_()
            given = inputs | {"weight": leaf, "advantage": ADVANTAGE}
            linear_grpo_loss(**given, **OPTIONS, backend=backend).loss.backward()
            found.append(leaf.grad)
    finally:
        dist.destroy_process_group()
    assert isinstance(found[1], DTensor) and found[1].placements == (Shard(0),)
    assert torch.equal(found[0], found[1].to_local())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_compiles_whole(backend):
    inputs = make_inputs(torch.bfloat16)
    leaves = [inputs.pop("hidden").requires_grad_(), inputs.pop("weight").requires_grad_()]

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        options = {"advantage": ADVANTAGE, "budget_bytes": 1400, "backend": backend}
        return linear_grpo_loss(hidden, weight, **inputs, **options, **OPTIONS).loss

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager, traced = run(*leaves), compiled(*leaves)
    torch.testing.assert_close(traced, eager)
    for one, other in zip(gradients(traced, leaves), gradients(eager, leaves), strict=True):
        torch.testing.assert_close(one, other)
