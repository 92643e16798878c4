"""TRL's log-probs and entropies by our kernels: the same numbers, and every place that uses them.

Letters: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import sys

import pytest
import torch

trl = pytest.importorskip("trl")

import trl.trainer.utils as utils  # noqa: E402
from trl.kernels import ChunkedLogProbFunction  # noqa: E402

from mgrpo.integrations import patch_kernels  # noqa: E402
from mgrpo.integrations.kernels.trl import kernel_patches  # noqa: E402

T, D, V = 11, 16, 53
STOCK = {
    name: getattr(utils, name)
    for name in ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")
}


@pytest.fixture
def patched():
    with patch_kernels(trl) as patch:
        yield patch


def head_inputs(dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    targets = torch.randint(V, (T,), generator=generator)
    return draw(T, D), draw(V, D), draw(V) if bias else None, targets


def through(function, inputs, **options):
    """Outputs and gradients of the fused head with upstream gradients that differ by token."""
    hidden, weight, bias, targets = inputs
    values = {"temperature": 1.0, "softcap": None, "scale": 1.0, "outputs": ("log_probs", "entropy")} | options
    outputs = function.apply(
        hidden, weight, bias, targets, values["temperature"], 7, values["softcap"], values["scale"], values["outputs"]
    )
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    loss = (outputs[0].float() * torch.linspace(-1, 2, T)).sum()
    if outputs[1] is not None:
        loss = loss + (outputs[1].float() * torch.linspace(1, -0.5, T)).sum()
    return outputs, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"softcap": 4.0, "temperature": 1.3}, {"scale": 0.25}, {"softcap": 3.0, "scale": 2.0}],
    ids=str,
)
def test_the_fused_head_is_trls(patched, dtype, bias, options):
    # TRL rounds each logit to bf16 and we do not, so both are held against TRL's own in fp64 of the same inputs.
    exact = [x if x is None or not x.is_floating_point() else x.detach().float() for x in head_inputs(dtype, bias)]
    exact = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in exact]
    expected, expected_grads = through(ChunkedLogProbFunction, exact, **options)
    ours, grads = through(utils._ChunkedLogProbFunction, head_inputs(dtype, bias), **options)
    stock, stock_grads = through(ChunkedLogProbFunction, head_inputs(dtype, bias), **options)
    pairs = zip([*ours[:2], *grads], [*stock[:2], *stock_grads], [*expected[:2], *expected_grads], strict=True)
    for own, theirs, truth in pairs:
        scale = truth.abs().max()
        error, allowed = (own.float() - truth).abs().max() / scale, (theirs.float() - truth).abs().max() / scale
        assert error <= 2 * allowed + 2e-6
    assert ours[2:] == (None, None, None)


def test_what_we_do_not_compute_is_left_to_trl(patched):
    everything = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    ours, _ = through(utils._ChunkedLogProbFunction, head_inputs(), outputs=everything)
    stock, _ = through(ChunkedLogProbFunction, head_inputs(), outputs=everything)
    assert all(torch.equal(own, theirs) for own, theirs in zip(ours, stock, strict=True))
    alone, _ = through(utils._ChunkedLogProbFunction, head_inputs(), outputs=("log_probs",))
    assert alone[1] is None


def test_autocast_decides_the_dtype_of_the_products(patched, monkeypatch):
    import mgrpo_kernels as K

    seen, compute = [], K.linear_token_logprob

    def watch(hidden, weight, targets, **options):
        seen.append((hidden.dtype, weight.dtype, options["bias"].dtype, torch.is_autocast_enabled("cpu")))
        return compute(hidden, weight, targets, **options)

    monkeypatch.setattr(K, "linear_token_logprob", watch)
    with torch.autocast("cpu", torch.bfloat16):
        _, grads = through(utils._ChunkedLogProbFunction, head_inputs())
    through(utils._ChunkedLogProbFunction, head_inputs())
    assert seen == [(torch.bfloat16,) * 3 + (False,), (torch.float32,) * 3 + (False,)]
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_only_labelled_positions_reach_the_head(patched, monkeypatch):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import mgrpo_kernels as K

    rows, compute = [], K.linear_token_logprob
    monkeypatch.setattr(
        K,
        "linear_token_logprob",
        lambda hidden, *rest, **options: (rows.append(len(hidden)), compute(hidden, *rest, **options))[1],
    )
    sizes = {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=V, head_dim=8, intermediate_size=32, **sizes))
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.randint(V, (2, 9))
    labels = ids.clone()
    labels[:, :6] = -100
    labels[1, 8] = -100
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert rows == [5]
    expected = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    picked = expected.gather(-1, ids[:, 1:, None])[..., 0].masked_fill(labels[:, 1:] == -100, 0)
    torch.testing.assert_close(out.log_probs, picked)
    entropy = -(expected.exp() * expected).sum(-1).masked_fill(labels[:, 1:] == -100, 0)
    torch.testing.assert_close(out.entropy, entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_functions_of_logits_are_trls(patched, dtype, temperature):
    logits = (4 * torch.randn(3, 5, V)).to(dtype).requires_grad_()
    index, mask = torch.randint(V, (3, 5)), torch.rand(3, 5) > 0.3
    exact = logits.detach().float().requires_grad_()
    upstream = torch.linspace(-1, 1, 15).view(3, 5)

    def both(functions, values):
        logprob = functions["selective_log_softmax"](values, index, temperature=temperature, row_mask=mask)
        entropy = functions["entropy_from_logits"](values)
        pair = functions["selective_log_softmax_and_entropy"](values, index, temperature=temperature, row_mask=mask)
        outputs = [logprob, entropy, *pair]
        (grad,) = torch.autograd.grad(sum((o.float() * upstream).sum() for o in outputs), values)
        return [*outputs, grad]

    ours = both({name: getattr(utils, name) for name in STOCK}, logits)
    assert all(getattr(utils, name) is not stock for name, stock in STOCK.items())
    for own, theirs, truth in zip(ours, both(STOCK, logits), both(STOCK, exact), strict=True):
        assert (own.float() - truth).abs().max() <= 2 * (theirs.float() - truth).abs().max() + 1e-5
    detached = utils.selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False)[1]
    assert not detached.requires_grad


def test_several_indices_a_row_are_left_to_trl(patched):
    logits, index = torch.randn(2, 3, V), torch.randint(V, (2, 3, 4))
    stock = STOCK["selective_log_softmax"](logits, index)
    assert torch.equal(utils.selective_log_softmax(logits, index), stock)


def test_a_temperature_of_zero_is_refused(patched):
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        utils.selective_log_softmax(torch.zeros(1, V), torch.zeros(1, dtype=torch.int64), temperature=0)


def test_every_module_of_trl_has_ours_and_then_its_own_again():
    def holders(functions):
        return {
            (name, key)
            for name, module in list(sys.modules.items())
            if name.partition(".")[0] == "trl" and module is not None
            for key, value in vars(module).items()
            if any(value is function for function in functions)
        }

    kernel_patches()  # imports the trainers
    before = holders([*STOCK.values()])
    assert len(before) >= 3
    with patch_kernels(trl):
        assert not holders(STOCK.values())
    assert holders([*STOCK.values()]) == before
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_a_trainer_takes_the_same_steps(make_trainer):
    """Loss, gradient and weights of whole steps, in fp32."""
    logs, weights = [], []
    for patched in (False, True):
        trainer = make_trainer(bf16=False, optim="sgd", learning_rate=0.5)
        if patched:
            with patch_kernels(trl):
                trainer.train()
        else:
            trainer.train()
        logs.append([row for row in trainer.state.log_history if "grad_norm" in row])
        weights.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    assert len(logs[0]) == len(logs[1]) == 2
    for stock, ours in zip(*logs, strict=True):
        assert ours["grad_norm"] == pytest.approx(stock["grad_norm"], rel=1e-4) and stock["grad_norm"] > 0
        assert ours["entropy"] == pytest.approx(stock["entropy"], rel=1e-5)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-6)


# Contracts: what of TRL the patches rely on.


def test_contract_fused_head_function():
    known = ["ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping"]
    assert [*inspect.signature(ChunkedLogProbFunction.forward).parameters] == [*known, "logit_scale", "outputs"]


def test_contract_fused_head_uses_the_names_that_are_replaced():
    source = inspect.getsource(utils.add_fused_lm_head)
    assert "_ChunkedLogProbFunction.apply(" in source and "_use_triton(" in source
    assert inspect.getsource(utils).count("_use_triton(") == 1  # nothing else in the module asks


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("selective_log_softmax", ["logits", "index", "temperature", "row_mask"]),
        ("entropy_from_logits", ["logits", "chunk_size"]),
        ("selective_log_softmax_and_entropy", ["logits", "index", "entropy_requires_grad", "temperature", "row_mask"]),
    ],
)
def test_contract_functions_of_logits(name, arguments):
    assert [*inspect.signature(STOCK[name]).parameters] == arguments
