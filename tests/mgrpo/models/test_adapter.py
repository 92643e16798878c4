"""LoRA: what adapters compute, what stays as it is, and which are refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from fake_llm import FakeLLM
from helpers import ARCHITECTURES, PAD, loaded, random_trajectories, same_bits, snapshot, tiny_model
from peft import LoraConfig as PeftConfig
from peft import PeftModel
from torch.func import functional_call

from mgrpo.config import KernelsConfig, LoraConfig, MomentumConfig
from mgrpo.errors import ConfigError, EngineError, InputError
from mgrpo.models.adapter import (
    INITIAL,
    MOMENTUM,
    POLICY,
    Adapter,
    AdapterMomentum,
    adapted_layers,
    plain_state_dict,
)
from mgrpo.models.adapter_folder import choose_config, read_config
from mgrpo.models.determinism import make_deterministic
from mgrpo.models.forward import Forward
from mgrpo.models.load import LoadedModel
from mgrpo.rollout.parity import BOUNDS
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.rollout.vllm.local import VllmEngine
from mgrpo.types import Sampling, WeightTag, join

IDS = torch.tensor([[2, 7, 3, 11, 5, 19]])
KERNELS = KernelsConfig(backend="reference")


def adapted(architecture="llama", *, seed=0, random=True, **lora):
    """A tiny model and its adapter, whose B is not zero with `random`."""
    model = tiny_model(architecture)
    adapter = Adapter(model, choose_config("some/base", LoraConfig(**{"rank": 3, **lora})), seed=seed)
    if random:
        randomise(adapter, POLICY)
    return model, adapter


def randomise(adapter, name, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for weight in adapter.weights(name).values():
        weight.data.copy_(0.3 * torch.randn(weight.shape, generator=generator))


def with_momentum(adapter, **options):
    adapter.add_frozen(MOMENTUM)
    return AdapterMomentum(adapter, MomentumConfig(**options), seed=0, kernels=KERNELS)


def by_hand(adapter, weights, scale=2.0):
    """The state dict W + scale B A, from tensors alone."""
    full = {name: tensor.detach().clone() for name, tensor in plain_state_dict(adapter.model).items()}
    for name, module in adapter.layers.items():
        a, b = (weights[f"{name}.lora_{part}.{POLICY}.weight"] for part in "AB")
        product = scale * b @ a
        full[f"{name}.weight"] = full[f"{name}.weight"] + (product.T if module.fan_in_fan_out else product)
    return full


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_adapter_changes_no_bit_and_every_linear_layer_but_the_head_has_one(architecture):
    expected = tiny_model(architecture)(IDS).logits
    model, adapter = adapted(architecture, random=False)
    assert torch.equal(model(IDS).logits, expected)
    assert model.get_output_embeddings() not in adapter.layers.values()
    per_layer = {"llama": 7, "qwen3": 7, "gpt2": 4, "gemma2": 7, "phi": 6}[architecture]
    assert len(adapter.layers) == 2 * per_layer
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == adapter.weights(POLICY).keys()
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert all(bool((p != 0).any()) == (".lora_A." in name) for name, p in trained.items())


def test_a_depends_on_the_seed_alone():
    (_, one), (_, same), (_, other) = (adapted(seed=seed, random=False) for seed in (3, 3, 4))
    torch.rand(7)
    assert same_bits(one.weights(POLICY), same.weights(POLICY))
    assert not same_bits(one.weights(POLICY), other.weights(POLICY))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = tiny_model("llama")
    torch.set_rng_state(before)
    Adapter(model, choose_config("b", LoraConfig(rank=2)), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_plain_pytorch_and_the_base_has_none(architecture):
    model, adapter = adapted(architecture)
    model.double()
    weights = {n: w.detach().clone().requires_grad_() for n, w in adapter.weights(POLICY).items()}
    plain = tiny_model(architecture).double()
    loss = torch.log_softmax(functional_call(plain, by_hand(adapter, weights), (IDS,), tie_weights=False).logits, -1)[
        0, :, 4
    ].sum()
    expected = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    found = torch.log_softmax(model(IDS).logits, -1)[0, :, 4].sum()
    found.backward()
    torch.testing.assert_close(found, loss)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)
            assert bool((parameter.grad != 0).any())
        else:
            assert parameter.grad is None and not parameter.requires_grad, name


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi"])
def test_the_pass_of_training_gives_the_base_no_gradient(architecture, monkeypatch):
    monkeypatch.setattr("mgrpo.models.forward.MAX_LOGITS_BYTES", 0)  # the fused head
    model, adapter = adapted(architecture)
    forward = Forward(loaded(model), temperature=1.0, kernels=KernelsConfig(), micro_batch_tokens=64)
    trajectories = random_trajectories([3, 5, 4, 2], num_prompts=2, num_policy=2)
    for _, batch in forward.own(trajectories, forward.plan(trajectories, torch.arange(4))):
        forward(model, batch).logprob.sum().backward()
    assert all((p.grad is not None) == (name in adapter.weights(POLICY)) for name, p in model.named_parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_switching_computes_with_each_adapter_and_leaves_flags_and_base_alone(architecture):
    model, adapter = adapted(architecture)
    base = snapshot(adapter.base_weights())
    plain = tiny_model(architecture)
    momentum = with_momentum(adapter)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert torch.equal(model(IDS).logits, _under(momentum, model))  # equal at the start
    randomise(adapter, MOMENTUM, seed=2)
    expected = {
        INITIAL: plain(IDS).logits,
        POLICY: functional_call(plain, by_hand(adapter, adapter.weights(POLICY)), (IDS,), tie_weights=False).logits,
        MOMENTUM: functional_call(plain, by_hand(adapter, adapter.weights(MOMENTUM)), (IDS,), tie_weights=False).logits,
    }
    for name in (MOMENTUM, INITIAL, POLICY, INITIAL, MOMENTUM):
        with adapter.using(name):
            torch.testing.assert_close(model(IDS).logits, expected[name], rtol=1e-4, atol=1e-4)
            assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
        torch.testing.assert_close(model(IDS).logits, expected[POLICY], rtol=1e-4, atol=1e-4)
    with pytest.raises(ZeroDivisionError), adapter.using(MOMENTUM):
        1 / 0  # noqa: B018
    torch.testing.assert_close(model(IDS).logits, expected[POLICY], rtol=1e-4, atol=1e-4)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert same_bits(adapter.base_weights(), base)
    assert sum(flags.values()) == 2 * len(adapter.layers)


def _under(momentum, model):
    with momentum.swapped():
        return model(IDS).logits


def test_the_momentum_adapter_averages_a_and_b_separately():
    _, adapter = adapted()
    momentum = with_momentum(adapter, decay=0.9)
    expected = {name: w.double() for name, w in snapshot(adapter.weights(POLICY)).items()}
    products = {layer: _product(expected, layer) for layer in adapter.layers}
    for step in range(3):
        randomise(adapter, POLICY, seed=10 + step)
        momentum.update(step, 3)
        for name, weight in adapter.weights(POLICY).items():
            expected[name] = 0.9 * expected[name] + 0.1 * weight.detach().double()
        for layer in adapter.layers:
            products[layer] = 0.9 * products[layer] + 0.1 * _product(adapter.weights(POLICY), layer).double()
    for name, weight in adapter.weights(MOMENTUM).items():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-6, atol=1e-7)
        assert weight.data_ptr() == momentum.weights[name].data_ptr() and not weight.requires_grad
    # Not the average of the products.
    assert all((_product(expected, layer) - mean).abs().max() > 0.01 for layer, mean in products.items())
    assert same_bits(momentum.state_dict(), momentum.weights)


def _product(weights, layer):
    a, b = (weights[f"{layer}.lora_{part}.{POLICY}.weight"].detach() for part in "AB")
    return b @ a


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_decodes_with_both_adapters_on_the_callers_own_base(architecture, dtype):
    model, adapter = adapted(architecture)
    policy = LoadedModel(
        model=model, tokenizer=None, eos_ids=(1,), pad_id=PAD, context_length=128, dtype=dtype, adapter=adapter
    )
    engine = TransformersEngine(model, eos_ids=(1,), pad_id=PAD, dtype=dtype, batch_size=8)
    if dtype == torch.bfloat16:
        assert adapter.cast_base(dtype)
    momentum = with_momentum(adapter)
    randomise(adapter, MOMENTUM, seed=2)
    forward = Forward(policy, temperature=1.0, kernels=KERNELS, micro_batch_tokens=256)
    prompts, gaps = [[2, 7, 3], [5, 4, 3, 9]], {}
    for source, weights in (("momentum", momentum.state_dict()), ("policy", policy.weights())):
        tag = WeightTag(source, 1)
        engine.update_weights(weights, tag)
        rollouts = engine.generate(prompts, 4, Sampling(max_new_tokens=12, seed=3), tag)
        batch = join(prompts, rollouts, None)
        for name in (POLICY, MOMENTUM):
            with adapter.using(name):
                gap = (forward.run(model, batch).logprob - rollouts.logprobs).abs()[batch.mask]
            gaps[source, name] = float(gap.mean())
    assert max(gaps["policy", POLICY], gaps["momentum", MOMENTUM]) <= BOUNDS[dtype]
    assert min(gaps["policy", MOMENTUM], gaps["momentum", POLICY]) > 2 * BOUNDS[dtype]
    own = {id(p) for p in model.parameters() if not p.requires_grad}
    for name, parameter in engine.model.named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == torch.float32
            assert parameter.data_ptr() == policy.weights()[name].data_ptr() and not parameter.requires_grad
        else:
            assert id(parameter) in own and parameter.dtype == dtype
    assert all(p.requires_grad for p in policy.weights().values())


def test_vllm_gets_the_names_and_shapes_of_the_base():
    model, adapter = adapted("qwen3")
    arguments = {"eos_ids": (1,), "pad_id": PAD, "dtype": torch.float32, "max_length": 40, "make_llm": FakeLLM}
    engine = VllmEngine(model, **arguments, options={})
    engine.update_weights(adapter.merged(POLICY, torch.float32), WeightTag("policy", 1))
    _, sent = engine._llm.calls[0]
    expected = by_hand(adapter, adapter.weights(POLICY))
    assert list(sent) == list(tiny_model("qwen3").state_dict()) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(sent[name], tensor.detach())
    engine.close()


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = tiny_model("llama")
        make_deterministic(model, gradient_checkpointing=checkpointing)
        adapter = Adapter(model, choose_config("b", LoraConfig(rank=3)), seed=0)
        randomise(adapter, POLICY)
        torch.log_softmax(model(IDS).logits, -1)[0, :, 4].sum().backward()
        found.append({name: weight.grad for name, weight in adapter.weights(POLICY).items()})
    assert same_bits(*found)


def test_the_engine_takes_nothing_but_adapters():
    model, adapter = adapted()
    engine = TransformersEngine(model, eos_ids=(1,), pad_id=PAD, dtype=torch.float32, batch_size=8)
    with pytest.raises(EngineError, match=r"lora_A\.policy\.weight is missing"):
        engine.update_weights(adapter.merged(POLICY, torch.float32), WeightTag("policy", 0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_weights_are_those_of_peft_under_the_names_of_the_base(architecture, tmp_path):
    model, adapter = adapted(architecture)
    base = tiny_model(architecture)
    adapter.save(tmp_path, adapter.weights(POLICY))
    peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(peft(IDS).logits, model(IDS).logits)
    expected = peft.merge_and_unload().state_dict()
    before = snapshot(adapter.base_weights())
    merged = adapter.merged(POLICY, torch.float32)
    assert list(merged) == list(base.state_dict()) and len(merged) == len(base.state_dict())
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name])
        assert not tensor.requires_grad
    assert same_bits(adapter.base_weights(), before)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    names = [n for n, t in merged.items() if t.data_ptr() == model.get_input_embeddings().weight.data_ptr()]
    assert len(names) == (2 if tied else 1)
    rounded = adapter.merged(POLICY, torch.bfloat16)
    changed = [f"{layer}.weight" for layer in adapter.layers]
    assert all(torch.equal(rounded[name], merged[name].bfloat16()) for name in changed)


def test_a_merged_model_is_a_plain_one():
    model, adapter = adapted("qwen3")
    expected, names = model(IDS).logits, list(tiny_model("qwen3").state_dict())
    adapter.merge()
    assert list(model.state_dict()) == names and not adapted_layers(model)
    torch.testing.assert_close(model(IDS).logits, expected)


def test_fp32_adapters_beside_a_bf16_base_move_at_a_small_learning_rate():
    model, adapter = adapted("qwen3")
    assert adapter.cast_base(torch.bfloat16)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    momentum = with_momentum(adapter, decay=0.5)
    weights = adapter.weights(POLICY)
    before = snapshot(weights)
    optimizer = torch.optim.AdamW(list(weights.values()), lr=1e-6, weight_decay=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.log_softmax(model(IDS).logits.float(), -1)[0, :, 4].sum().backward()
    optimizer.step()
    momentum.update(0, 1)
    for name, weight in weights.items():
        assert weight.dtype == torch.float32 == momentum.weights[name].dtype
        moved, averaged = (weight.detach() - before[name]).abs(), (momentum.weights[name] - before[name]).abs()
        assert 0.5e-6 < float(moved.max()) < 1.1e-6 and float((moved > 0).float().mean()) > 0.9, name
        assert float((averaged > 0).float().mean()) > 0.5, name
        assert torch.equal(before[name].bfloat16(), weight.detach().bfloat16()) or moved.max() < 1e-5


def test_a_base_that_does_not_tolerate_rounding_stays_as_it_is(monkeypatch):
    _, adapter = adapted()
    before = snapshot(adapter.base_weights())
    monkeypatch.setattr("mgrpo.models.adapter._ROUNDING", -1.0)
    assert not adapter.cast_base(torch.bfloat16)
    assert same_bits(adapter.base_weights(), before)


def test_a_folder_is_read_as_it_was_written(tmp_path):
    model, adapter = adapted()
    adapter.save(tmp_path, adapter.weights(POLICY))
    config = read_config(str(tmp_path))
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (3, 6, "some/base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(config.target_modules)
    model = tiny_model("llama")
    other = Adapter(model, choose_config(str(tmp_path), LoraConfig()), seed=9, folder=tmp_path)
    assert same_bits(snapshot(other.weights(POLICY)), snapshot(adapter.weights(POLICY)))
    randomise(other, POLICY, seed=4)
    with other.using(INITIAL):  # what training began with, not the base alone
        torch.testing.assert_close(model(IDS).logits, adapter.model(IDS).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(iter(t))), "must hold A and B of 14 layers, it lacks base_model"),
        (lambda t: t.update({"x": torch.ones(1)}), "it also holds x"),
        (lambda t: t.update({next(iter(t)): torch.ones(2, 2)}), r"must have shape \(3, 32\), got \(2, 2\)"),
        (lambda t: next(iter(t.values())).fill_(torch.nan), "must be finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    from safetensors.torch import load_file, save_file

    _, adapter = adapted()
    adapter.save(tmp_path, adapter.weights(POLICY))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message):
        adapter.read(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "targets", "message"),
    [
        ("llama", ("q_proj", "nothing"), "nothing matches nothing. It has down_proj, gate_proj, k_proj"),
        ("llama", ("embed_tokens",), "embed_tokens is no linear layer"),
        ("llama", ("self_attn",), "self_attn is no linear layer"),
        ("llama", ("mlp.gate_proj.weight",), "is a parameter, as the experts of a MoE are"),
        ("qwen3", ("q_proj", "lm_head"), "must leave lm_head out, its weight is that of the embedding"),
    ],
)
def test_targets_that_are_no_linear_layer_are_refused(architecture, targets, message):
    with pytest.raises(ConfigError, match=message):
        adapted(architecture, targets=targets)


def test_named_targets_are_adapted_an_untied_head_too():
    model, adapter = adapted("llama", targets=("q_proj", "lm_head"))
    assert sorted(adapter.layers) == ["lm_head", *(f"model.layers.{i}.self_attn.q_proj" for i in range(2))]
    forward = Forward(loaded(model), temperature=1.0, kernels=KERNELS, micro_batch_tokens=64)
    trajectories = random_trajectories([3, 5], num_prompts=1, num_policy=2)
    found = forward.run(model, trajectories).logprob
    plain = tiny_model("llama")
    plain.load_state_dict(by_hand(adapter, adapter.weights(POLICY)))
    expected = Forward(loaded(plain), temperature=1.0, kernels=KERNELS, micro_batch_tokens=64).run(plain, trajectories)
    torch.testing.assert_close(found, expected.logprob, rtol=1e-4, atol=1e-5)


def test_a_model_without_linear_layers_is_refused():
    model = tiny_model("llama")
    for name in list(dict(model.named_modules())):
        if name.endswith("_proj"):
            model.set_submodule(name, torch.nn.Identity())
    with pytest.raises(ConfigError, match="needs a model with linear layers, LlamaForCausalLM has none"):
        Adapter(model, choose_config("b", LoraConfig(rank=2)), seed=0)


def test_experts_that_peft_would_adapt_as_parameters_are_refused():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2))
    with pytest.raises(ConfigError, match=r"\(target_parameters\), as the experts of a MoE are"):
        Adapter(model, choose_config("b", LoraConfig(rank=2)), seed=0)


def test_without_peft_the_option_names_the_extra(monkeypatch):
    monkeypatch.setattr("mgrpo.models.adapter_folder.find_spec", lambda name: None)
    assert choose_config("b", LoraConfig()) is None
    with pytest.raises(ConfigError) as error:
        choose_config("b", LoraConfig(rank=2))
    assert str(error.value) == (
        "config: --lora.rank needs the package peft, it is not installed. pip install mgrpo[lora]."
    )


def test_a_rank_alone_suffices_and_the_others_need_it():
    config = choose_config("b", LoraConfig(rank=5))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (5, 10, 0.0, "none")
    assert choose_config("b", LoraConfig(rank=5, alpha=3)).lora_alpha == 3
    with pytest.raises(ConfigError, match=r"--lora\.alpha and --lora\.targets need --lora\.rank of at least 1, got 0"):
        choose_config("b", LoraConfig(alpha=3, targets=("q_proj",)))


def test_options_that_contradict_a_folder_are_refused_by_name(tmp_path):
    _, adapter = adapted(targets=("q_proj", "k_proj"))
    adapter.save(tmp_path, adapter.weights(POLICY))
    same = choose_config(str(tmp_path), LoraConfig(rank=3, alpha=6, targets=("q_proj", "k_proj")))
    assert same.r == 3 and not same.inference_mode
    with pytest.raises(ConfigError) as error:
        choose_config(str(tmp_path), LoraConfig(rank=4, alpha=8, targets=("q_proj",)))
    file = tmp_path / "adapter_config.json"
    assert error.value.problems == [
        f"config: --lora.rank must be 3, as in {file}, got 4. Leave it out.",
        f"config: --lora.alpha must be 6, as in {file}, got 8. Leave it out.",
        f"config: --lora.targets must be k_proj q_proj, as in {file}, got q_proj. Leave it out.",
    ]


def test_a_folder_may_have_ranks_of_its_own_and_a_pattern(tmp_path):
    pattern = r".*\.self_attn\.(q|v)_proj"
    options = {"rank_pattern": {"v_proj": 2}, "use_rslora": True, "lora_dropout": 0.5}
    PeftConfig(r=4, target_modules=pattern, base_model_name_or_path="b", **options).save_pretrained(tmp_path)
    config = choose_config(str(tmp_path), LoraConfig())
    model = tiny_model("llama")
    adapter = Adapter(model, config, seed=0)
    randomise(adapter, POLICY)
    assert [w.shape[0] for n, w in adapter.weights(POLICY).items() if ".lora_A." in n] == [4, 2, 4, 2]
    adapter.save(tmp_path, adapter.weights(POLICY))
    loaded_by_peft = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    torch.testing.assert_close(loaded_by_peft(IDS).logits, model(IDS).logits)
    assert torch.equal(model.train()(IDS).logits, model.eval()(IDS).logits)  # without dropout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_more_than_plain_lora_is_refused(tmp_path, options, named):
    PeftConfig(target_modules=["q_proj"], base_model_name_or_path="b", **options).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"must describe plain LoRA, got {named}"):
        read_config(str(tmp_path))


def test_options_of_the_momentum_model_that_do_not_apply_are_refused(small):
    with pytest.raises(ConfigError) as error:
        small({"lora.rank": 2, "momentum.dtype": "bf16-kahan", "momentum.device": "cpu"})
    assert [problem.split(" with")[0] for problem in error.value.problems] == [
        "config: --momentum.dtype must be fp32",
        "config: --momentum.device must be same",
    ]
