"""verl's log-probs and entropies by our kernels, against its own.

T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import verl
from transformers import AutoModelForCausalLM
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.utils import torch_functional as stock
from verl.utils.experimental import torch_functional as fused
from verl.workers.engine.fsdp import transformer_impl

import mgrpo_kernels as K
from mgrpo.integrations import patch_kernels
from mgrpo.integrations.kernels import verl as verl_kernels
from mgrpo_kernels.testing import peaked_logits

T, V = 7, 301
DTYPES = [torch.float32, torch.bfloat16]


def make_logits(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = peaked_logits(T, V, dtype=dtype)
    labels = torch.randint(V, (T,), generator=generator)
    labels[::2] = logits[::2].argmax(1)
    return logits, labels


def oracle(logits, labels, weights):
    """Log-probs, entropies and the gradient of their weighted sum in fp64."""
    z = logits.double().requires_grad_()
    logp = z.log_softmax(-1)
    chosen, entropy = logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    (chosen @ weights[0] + entropy @ weights[1]).backward()
    return chosen.detach(), entropy.detach(), z.grad


def run(logits, labels, weights, *, inplace):
    z = logits.clone().requires_grad_()
    scaled = z / torch.ones(T, 1, dtype=logits.dtype)  # not a leaf, as logits never are
    chosen = transformer_impl.logprobs_from_logits(logits=scaled, labels=labels, inplace_backward=inplace)
    entropy = stock.entropy_from_logits(scaled)
    loss = chosen.double() @ weights[0] + entropy.double() @ weights[1]
    if inplace:
        loss = chosen.double() @ weights[0]  # nobody else may read the logits
    loss.backward()
    return chosen.detach(), entropy.detach(), z.grad


def error(found, wanted):
    return float((found.double() - wanted).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_at_least_as_near_to_the_truth_as_verls(dtype):
    logits, labels = make_logits(dtype)
    weights = torch.randn(2, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = oracle(logits, labels, weights)
    theirs = run(logits, labels, weights, inplace=False)
    with patch_kernels(verl):
        ours = run(logits, labels, weights, inplace=False)
    for name, a, b, truth in zip(("logprob", "entropy", "gradient"), ours, theirs, wanted, strict=True):
        assert error(a, truth) <= 2 * error(b, truth) + 1e-6, name
    assert ours[0].dtype == ours[1].dtype == torch.float32 and ours[2].dtype == dtype
    assert wanted[2].abs().max() > 0.1  # so that a gradient of zeros is not near


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_in_place_gives_the_same_gradient(dtype):
    logits, labels = make_logits(dtype)
    weights = torch.randn(2, T, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with patch_kernels(verl):
        plain = run(logits, labels, torch.stack([weights[0], weights[1] * 0]), inplace=False)
        inplace = run(logits, labels, weights, inplace=True)
    assert error(inplace[2], plain[2].double()) <= (1e-7 if dtype == torch.float32 else 1e-2)
    assert inplace[2].abs().max() > 0.1


def test_the_backward_in_place_writes_over_the_logits_and_never_over_a_leaf():
    logits, labels = make_logits(torch.float32)
    leaf = logits.clone().requires_grad_()
    verl_kernels.logprobs_from_logits(leaf, labels, inplace_backward=True).sum().backward()
    assert torch.equal(leaf, logits) and leaf.grad.abs().max() > 0.1
    scaled = leaf * 1.0
    before = scaled.detach().clone()
    verl_kernels.logprobs_from_logits(scaled, labels, inplace_backward=True).sum().backward()
    assert not torch.equal(scaled.detach(), before)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_a_temperature_that_verl_has_divided_by_is_taken_as_it_is(temperature):
    logits, labels = make_logits(torch.float32)
    scaled = transformer_impl._scale_logits_by_temperature(
        logits.clone(), torch.full((T, 1), temperature), is_unit_temperature=False
    )
    theirs = stock.logprobs_from_logits(scaled, labels)
    with patch_kernels(verl):
        ours = stock.logprobs_from_logits(scaled, labels)
    torch.testing.assert_close(ours, theirs)
    assert (theirs - logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]).abs().max() > 0.05


def test_padded_batches_and_chunks_keep_their_shape():
    logits, labels = make_logits(torch.float32)
    logits, labels = logits[:6].view(2, 3, V), labels[:6].view(2, 3)
    flat = stock.entropy_from_logits_with_chunking(logits.flatten(0, 1), chunk_size=4)
    theirs = stock.logprobs_from_logits(logits, labels), stock.entropy_from_logits(logits)
    with patch_kernels(verl):
        ours = stock.logprobs_from_logits(logits, labels), stock.entropy_from_logits(logits)
        torch.testing.assert_close(stock.entropy_from_logits_with_chunking(logits.flatten(0, 1), chunk_size=4), flat)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape == (2, 3)
        torch.testing.assert_close(a, b)


def test_every_name_is_replaced_and_undone():
    head = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    names = [
        (stock, "logprobs_from_logits"),
        (transformer_impl, "logprobs_from_logits"),
        (stock, "entropy_from_logits"),
        (stock, "entropy_from_logits_with_chunking"),
        (fused.FusedLinearForPPO, "forward"),
        (head, "linear_cross_entropy"),
    ]
    before = [getattr(owner, name) for owner, name in names]
    with patch_kernels(verl):
        for (owner, name), old in zip(names, before, strict=True):
            assert getattr(owner, name) is not old, name
        left = {
            module
            for module, loaded in sys.modules.items()
            if module.split(".")[0] == "verl" and any(value is before[0] for value in vars(loaded).values())
        }
        assert not left
    assert [getattr(owner, name) for owner, name in names] == before


@pytest.fixture
def model(model_folder):
    """A model whose forward is verl's fused one."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    patched = model.forward
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    yield model
    type(model).forward = patched.__func__


def forward(model, ids, dtype, weights):
    model.zero_grad()
    out = model.to(dtype)(input_ids=ids, temperature=0.8, return_dict=True, use_cache=False)
    (out.log_probs.float() * weights[0] + out.entropy.float() * weights[1]).sum().backward()
    grads = {name: p.grad.float().clone() for name, p in model.named_parameters()}
    return out.log_probs.detach(), out.entropy.detach(), grads


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_the_fused_forward_is_verls(model, dtype, tolerance):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 17, (2, 9), generator=generator)
    weights = torch.randn(2, 2, 9, generator=generator)
    theirs = forward(model, ids, dtype, weights)
    with patch_kernels(verl):
        ours = forward(model, ids, dtype, weights)
    assert ours[0].shape == theirs[0].shape == (2, 9) and ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0].float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours[1].float(), theirs[1].float(), rtol=tolerance, atol=tolerance)
    for name, grad in theirs[2].items():
        scale = float(grad.abs().max())
        assert scale > 1e-4, name
        assert float((ours[2][name] - grad).abs().max()) <= tolerance * scale, name


def test_the_fused_forward_is_ours_only_within_the_block(model, monkeypatch):
    calls = []
    real = K.linear_token_logprob
    monkeypatch.setattr(K, "linear_token_logprob", lambda *a, **k: calls.append(1) or real(*a, **k))
    ids = torch.randint(2, 17, (1, 5))
    weights = torch.ones(2, 1, 5)
    with patch_kernels(verl):
        forward(model, ids, torch.float32, weights)
    assert len(calls) == 1
    forward(model, ids, torch.float32, weights)
    assert len(calls) == 1


def test_under_autocast_the_head_is_multiplied_in_its_dtype():
    generator = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(T, 16, generator=generator), torch.randn(V, 16, generator=generator)
    labels = torch.randint(V, (T,), generator=generator)
    head = fused.FusedLinearForPPO()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = head(hidden, weight, labels, temperature=0.9)
        with patch_kernels(verl):
            ours = head(hidden, weight, labels, temperature=0.9)
    exact = head(hidden, weight, labels, temperature=0.9)
    assert float((ours[0] - exact[0]).detach().abs().max()) > 1e-4  # rounded to bf16
    torch.testing.assert_close(ours[0], theirs[0], rtol=3e-2, atol=3e-2)


def test_verls_triton_head_is_replaced_but_for_what_we_do_not_compute():
    head = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    generator = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(1, T, 16, generator=generator), torch.randn(V, 16, generator=generator)
    labels = torch.randint(V, (1, T), generator=generator)
    wanted = fused.FusedLinearForPPO()(hidden, weight, labels, temperature=0.9)
    with patch_kernels(verl):
        found = head.linear_cross_entropy(hidden, weight, labels, 0.9, "none")
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.view(1, T), b)
    asked = []
    ours = verl_kernels.make_linear_cross_entropy(lambda *a: asked.append(a) or "theirs")
    assert ours(hidden, weight, labels, 0.9, "mean") == "theirs"
    assert ours(hidden, weight, labels, dist_process_group="group") == "theirs"
    assert [call[4:] for call in asked] == [("mean", None), ("none", "group")]
