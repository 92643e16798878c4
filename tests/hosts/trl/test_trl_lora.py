"""MGRPOTrainer with `peft_config`: the momentum model is a second adapter of the policy's model."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from small_run import BASE, problems

pytest.importorskip("trl")
pytest.importorskip("peft")

from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from mgrpo.integrations.trl import MGRPOTrainer


@pytest.fixture
def make_lora(make_args):
    made = []

    def make(config=None, **changes):
        torch.manual_seed(0)
        config = config or LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
        data = Dataset.from_list(problems())
        made.append(MGRPOTrainer(BASE, None, make_args(**changes), train_dataset=data, peft_config=config))
        return made[-1]

    yield make
    for trainer in made:
        trainer.checker.close()


def parts(trainer):
    """Copies of the policy's adapter, the momentum model's and the base, by common names."""
    found = {"default": {}, "momentum": {}, "base": {}}
    for name, parameter in trainer.model.named_parameters():
        kind = next((k for k in ("default", "momentum") if f".{k}." in name), "base")
        found[kind][name.replace(f".{kind}.", ".")] = parameter.detach().clone()
    return found["default"], found["momentum"], found["base"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_momentum_adapter_is_the_average_and_makes_the_momentum_rollouts(make_lora, monkeypatch):
    trainer = make_lora(max_steps=3, momentum_decay=0.75, learning_rate=0.01)
    policy, expected, base = parts(trainer)
    assert same(policy, expected) and len(policy) == 28
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    step, generate, seen = trainer.momentum.on_step_end, GRPOTrainer._generate_single_turn, []

    def follow(*args, **kwargs):
        for name, weight in parts(trainer)[0].items():
            expected[name] = 0.75 * expected[name] + 0.25 * weight
        return step(*args, **kwargs)

    def watch(self, prompt_ids, *args):
        assert [name for name, p in self.model.named_parameters() if p.requires_grad] == trained
        seen.append((len(prompt_ids), self.model.active_adapters))
        return generate(self, prompt_ids, *args)

    trainer.momentum.on_step_end = follow
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", watch)
    trainer.train()
    assert seen == [(8, ["momentum"]), (16, ["default"])] * 3
    now, momentum, same_base = parts(trainer)
    assert same(base, same_base) and not same(now, policy)
    for name, weight in momentum.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(weight, now[name])
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        own = trainer.model(ids).logits
        with trainer.momentum.lent():
            lent = trainer.model(ids).logits
        assert torch.equal(trainer.model(ids).logits, own) and not torch.equal(lent, own)
    assert [name for name, p in trainer.model.named_parameters() if p.requires_grad] == trained


@pytest.mark.parametrize("dtype", ["fp32", "bf16-kahan"])
def test_resumed_it_is_the_straight_run(make_lora, tmp_path, dtype):
    options = {"max_steps": 2, "momentum_dtype": dtype, "momentum_decay": 0.9, "learning_rate": 0.01}
    options |= {"save_strategy": "steps", "save_steps": 1}
    straight = make_lora(output_dir=str(tmp_path / "straight"), **options)
    straight.train()
    resumed = make_lora(output_dir=str(tmp_path / "resumed"), **options)
    checkpoint = tmp_path / "straight" / "checkpoint-1"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for one, other in zip(parts(straight), parts(resumed), strict=True):
        assert same(one, other)
    logs = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (straight, resumed)]
    assert logs[0] == logs[1] and len(logs[0]) == 2
    if dtype == "bf16-kahan":
        assert same(resumed.momentum.started.compensation, straight.momentum.started.compensation)
        return
    straight.save_momentum_model(tmp_path / "momentum")
    for folder, name in ((tmp_path / "momentum", "momentum"), (checkpoint, None), (checkpoint / "momentum", None)):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), folder)
        if name:
            layers = {n: m for n, m in straight.model.named_modules() if isinstance(m, LoraLayer)}
            assert len(layers) == 14
            for layer, module in layers.items():
                found = loaded.get_submodule(layer).get_delta_weight("default")
                assert torch.equal(found, module.get_delta_weight(name)) and found.any()
    (checkpoint / "momentum" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"momentum/adapter_model\.safetensors must exist to resume"):
        resumed.momentum.load(checkpoint, resumed.model)


def test_vllm_gets_either_adapter_merged_and_the_base_keeps_its_bits(make_lora, monkeypatch):
    """TRL's own walk over the merged weights, with a dictionary where the engine would be."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", MergedVllm)
    trainer = make_lora(
        use_vllm=True, vllm_mode="colocate", vllm_importance_sampling_correction=False, momentum_decay=0.5
    )
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name and parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    monkeypatch.setattr(
        "mgrpo.integrations.trl.trainer.group_advantage", lambda total, *_: torch.linspace(-1, 1, 16).view(4, 4)
    )
    base = parts(trainer)[2]
    trainer.train()
    assert same(parts(trainer)[2], base)
    momentum0, policy0, momentum1, policy1 = trainer.vllm_generation.held
    names = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in base}
    assert momentum0.keys() == names and same(momentum0, policy0)
    assert not same(momentum1, policy1) and not same(policy1, policy0) and not same(momentum1, momentum0)
    layer = "model.layers.0.self_attn.q_proj"
    module = trainer.model.get_base_model().get_submodule(layer)
    before = module.base_layer.weight
    assert not torch.equal(momentum0[f"{layer}.weight"], before)


class MergedVllm:
    """Holds what TRL would load into vLLM, and answers every prompt with the same text."""

    def __init__(self, model, processing_class, accelerator=None, **options):
        self.tokenizer, self.held = processing_class, []
        self.walker = SimpleNamespace(
            model=model,
            _dist=SimpleNamespace(is_fsdp=False, gather_params=lambda _: nullcontext()),
            _fix_param_name_to_vllm=lambda name, extra_prefixes=(): name,
        )

    def sync_weights(self):
        walk = VLLMGeneration._iter_named_params(self.walker)
        self.held.append({name: tensor.detach().clone() for name, tensor in walk})

    def generate(self, prompts, images, num_generations, profiler=None):
        response = [*self.tokenizer.encode("#42"), self.tokenizer.eos_token_id]
        return prompts, [response] * len(prompts), [[[-0.5]] * len(response)] * len(prompts), None


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), {}, "with peft_type LORA, got .*IA3"),
        (LoraConfig(use_dora=True, target_modules=["q_proj"]), {}, "with use_dora False, got True"),
        (LoraConfig(bias="all", target_modules=["q_proj"]), {}, "with bias none, got all"),
        (LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"]), {}, "init_lora_weights True, got pissa"),
        (
            LoraConfig(target_modules=["q_proj"]),
            {"momentum_device": "cpu"},
            "momentum_device must be same with peft_config, got cpu",
        ),
    ],
    ids=["ia3", "dora", "bias", "pissa", "device"],
)
def test_what_is_no_second_adapter_is_refused(make_lora, config, changes, message):
    with pytest.raises(ValueError, match=rf"MGRPOTrainer: .*{message}"):
        make_lora(config, **changes)
