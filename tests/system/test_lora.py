"""Runs with LoRA: training, checkpoints, resume, adapter folders, export and what the commands say of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import same_bits, snapshot
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mgrpo import evaluate, export
from mgrpo.config import ModelConfig
from mgrpo.errors import CheckpointError
from mgrpo.models.adapter import MOMENTUM, POLICY, MergedWeights
from mgrpo.models.load import load_model
from mgrpo.models.tokenizer import resolve_path
from mgrpo.rollout.engine import Engine
from mgrpo.rollout.parity import BOUNDS
from mgrpo.types import WeightTag

BASE = resolve_path("builtin:arithmetic")
IDS = torch.tensor([[3, 12, 4, 14, 2, 5]])
LORA = {"lora.rank": 3, "optim.lr": 1e-2, "momentum.decay": 0.5}
CARRYING = LORA | {
    "steps": 4,
    "data.train": "arithmetic:10:2-3:0",
    "optim.warmup_ratio": 0.3,
    "optim.num_minibatches": 2,
    "optim.weight_decay": 0.01,
    "momentum.every": 3,
    "momentum.schedule": "cosine",
    "objective.kl_coef": 0.05,
    "objective.kl_reference": "initial",
}
POLICY_FILE, MOMENTUM_FILE = (f"{source}/adapter_model.safetensors" for source in ("policy", "momentum"))


def base():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def contents(folder):
    """Every tensor of a checkpoint, and its state but for global generators."""
    state = json.loads((folder / "state.json").read_text())
    del state["rng"]
    return {str(p.relative_to(folder)): load_file(p) for p in sorted(folder.rglob("*.safetensors"))}, state


@pytest.fixture
def run_of_two(launch, tmp_path):
    """A run that ended after 2 of 4 steps, and its checkpoint."""
    assert launch(CARRYING, "--stop-after", "2") == 0
    return tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_2"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_base_keeps_every_bit_and_both_adapters_move(small, trained, dtype):
    options = LORA | {"model.dtype": dtype, "objective.kl_coef": 0.05, "objective.kl_reference": "initial"}
    fresh = load_model(small(options).model, small(options).lora, seed=0)
    start = {
        name: w.to(torch.bfloat16 if dtype == "bf16" else w.dtype) for name, w in fresh.adapter.base_weights().items()
    }
    first = snapshot(fresh.weights())
    trainer, rows = trained(small(options), 3)
    adapter = trainer.loaded.adapter
    assert same_bits(adapter.base_weights(), start)
    policy, momentum = snapshot(trainer.loaded.weights()), snapshot(trainer.momentum.state_dict())
    assert policy.keys() == momentum.keys() == first.keys() == set(trainer.learner.names)
    for name in policy:
        assert not torch.equal(policy[name], first[name]) and not torch.equal(momentum[name], policy[name]), name
        assert policy[name].dtype == momentum[name].dtype == torch.float32
    assert len(trainer.learner.optimizer.state) == len(policy)
    number = sum(p.numel() for p in policy.values())
    assert [row["trained_parameters"] for row in rows] == [number] * 3
    bound = BOUNDS[trainer.loaded.dtype]
    assert all(row["parity_policy"] <= bound and row["parity_momentum"] <= bound for row in rows[:2])
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[2]["kl"] > 1e-4
    assert all(p.grad is None for p in trainer.model.parameters() if not p.requires_grad)


def test_a_tiny_learning_rate_moves_fp32_adapters_beside_a_bf16_base(small, trained):
    options = LORA | {"model.dtype": "bf16", "optim.lr": 1e-6, "optim.warmup_ratio": 0.0}
    start = snapshot(load_model(small(options).model, small(options).lora, seed=0).weights())
    trainer, _ = trained(small(options), 1)
    dtypes = {p.dtype for p in trainer.model.parameters() if not p.requires_grad and p.ndim == 2}
    assert torch.bfloat16 in dtypes
    moved = [(w - start[name]).abs().max().item() for name, w in trainer.loaded.weights().items() if ".lora_B." in name]
    assert all(0.9e-6 < most < 1.1e-6 for most in moved)


def test_an_engine_of_its_own_gets_the_merged_weights(small, trained):
    class Recorder(Engine):
        def __init__(self, loaded, config):
            from mgrpo.rollout.transformers import TransformersEngine

            plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
            options = {"eos_ids": loaded.eos_ids, "pad_id": loaded.pad_id, "dtype": torch.float32, "batch_size": 64}
            self.engine, self.kinds = TransformersEngine(plain, **options), []

        def update_weights(self, weights, tag):
            self.kinds.append(type(weights))
            self.engine.update_weights({name: tensor.clone() for name, tensor in weights.items()}, tag)

        def generate(self, *arguments):
            return self.engine.generate(*arguments)

    trainer, rows = trained(small(LORA), 2, make_engine=Recorder)
    assert set(trainer.engine.kinds) == {MergedWeights} and len(trainer.engine.kinds) == 4
    assert max(rows[1]["parity_policy"], rows[1]["parity_momentum"]) <= BOUNDS[torch.float32]
    for source in (POLICY, MOMENTUM):
        merged, tag = trainer.weights(source)
        assert tag == WeightTag(source, 2)
        plain = base()
        plain.load_state_dict(dict(merged))
        with trainer.loaded.adapter.using(source):
            torch.testing.assert_close(plain(IDS).logits, trainer.model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_holds_two_adapters_that_peft_loads(small, trained, tmp_path):
    trainer, _ = trained(small(LORA), 2)
    trainer.save(tmp_path)
    files, state = contents(tmp_path)
    assert files.keys() == {POLICY_FILE, MOMENTUM_FILE, "optimizer.safetensors"}
    assert not same_bits(files[POLICY_FILE], files[MOMENTUM_FILE])
    assert state["fingerprints"]["model.path/weights"] and not state["fingerprints"]["model.path/adapter"]
    assert not list(tmp_path.rglob("model.safetensors"))
    for source in (POLICY, MOMENTUM):
        loaded = PeftModel.from_pretrained(base(), tmp_path / source)
        with trainer.loaded.adapter.using(source):
            torch.testing.assert_close(loaded(IDS).logits, trainer.model(IDS).logits)
        assert json.loads((tmp_path / source / "adapter_config.json").read_text())["base_model_name_or_path"] == (
            "builtin:arithmetic"
        )
        assert AutoTokenizer.from_pretrained(tmp_path / source).encode("1+2=") == [3, 12, 4, 14]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_is_the_straight_one(launch, resume, tmp_path, rows_of, dtype):
    options = CARRYING | {"model.dtype": dtype}
    assert launch(options, run_dir=tmp_path / "straight") == 0
    assert launch(options, "--stop-after", "2") == 0
    assert resume("--stop-after", "4") == 0
    (straight, state), (resumed, other) = (
        contents(tmp_path / name / "checkpoints" / "step_4") for name in ("straight", "run")
    )
    assert straight.keys() == resumed.keys() and state == other
    assert all(same_bits(straight[file], resumed[file]) for file in straight)
    assert rows_of(tmp_path / "straight") == rows_of(tmp_path / "run")
    before, _ = contents(tmp_path / "run" / "checkpoints" / "step_2")
    assert not any(same_bits(before[file], resumed[file]) for file in before)


def test_runs_with_and_without_an_adapter_refuse_each_others_checkpoint(
    small, trained, resume, run_of_two, tmp_path, capsys
):
    run_dir, checkpoint = run_of_two
    assert resume("--lora.rank", "0", run_dir=run_dir) == 2
    assert "resume: --lora.rank must be 3, as the run was started, got 0." in " ".join(capsys.readouterr().err.split())
    data = {"data.train": CARRYING["data.train"]}
    whole, _ = trained(small(data), 1)
    whole.save(tmp_path / "whole")
    with pytest.raises(
        CheckpointError, match=r"policy holds an adapter, this run trains all weights\. Set --lora\.rank"
    ):
        whole.restore(checkpoint)
    adapted, _ = trained(small(LORA | data), 0)
    with pytest.raises(
        CheckpointError, match=r"policy holds a whole model, this run trains an adapter\. Leave --lora\.\*"
    ):
        adapted.restore(tmp_path / "whole")


def test_a_checkpoint_of_another_base_is_refused(small, trained, run_of_two, tmp_path):
    model = base()
    model.get_input_embeddings().weight.data[3] += 1e-3
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "other")
    trainer, _ = trained(small(CARRYING | {"model.path": str(tmp_path / "other")}), 0)
    with pytest.raises(CheckpointError, match=r"--model\.path must hold the weights that .* was trained with"):
        trainer.restore(run_of_two[1])


def test_an_adapter_folder_is_trained_on(small, trained, run_of_two):
    _, checkpoint = run_of_two
    options = {"model.path": str(checkpoint / "policy"), "optim.lr": 1e-2, "log.kl_initial_every": 1}
    saved = load_file(checkpoint / POLICY_FILE)
    untouched, _ = trained(small(options), 0)
    assert [w.tolist() for w in untouched.loaded.weights().values()] == [
        saved[f"base_model.model.{name.replace('.policy.', '.')}"].tolist() for name in untouched.loaded.weights()
    ]
    trainer, rows = trained(small(options), 2)
    assert not same_bits(snapshot(trainer.loaded.weights()), snapshot(untouched.loaded.weights()))
    assert rows[0]["kl_initial"] == 0 and rows[1]["kl_initial"] > 0  # to the adapter that training began with
    assert rows[0]["trained_parameters"] == sum(t.numel() for t in saved.values())
    folder = checkpoint.parent / "again"
    trainer.save(folder)
    state = contents(folder)[1]["fingerprints"]
    assert state["model.path/weights"] == contents(checkpoint)[1]["fingerprints"]["model.path/weights"]
    assert state["model.path/adapter"]


def test_an_adapter_folder_is_checked_by_name(launch, run_of_two, tmp_path, capsys):
    def refused(**changes):
        capsys.readouterr()
        assert launch({"model.path": folder, "run_dir": tmp_path / "none"} | changes) == 2
        return " ".join(capsys.readouterr().err.split())

    folder = tmp_path / "adapter"
    shutil.copytree(run_of_two[1] / "policy", folder)
    file = folder / "adapter_config.json"
    assert refused(**{"lora.rank": 4}).startswith(f"config: --lora.rank must be 3, as in {file}, got 4.")
    assert "--momentum.dtype must be fp32 with LoRA" in refused(**{"momentum.dtype": "bf16-kahan"})
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {"base_model_name_or_path": str(tmp_path / "gone" / "model")}))
    assert refused() == (
        f"model: base_model_name_or_path of {file} must be a folder or hub id, {tmp_path}/gone/model does not exist. "
        "Write the base's place there."
    )
    file.write_text(json.dumps(written | {"base_model_name_or_path": None}))
    assert "must name the base model, got None" in refused()
    file.write_text("{")
    assert "must hold JSON" in refused()
    file.write_text(json.dumps(written))
    (folder / "adapter_model.safetensors").unlink()
    assert "must hold adapter_model.safetensors beside adapter_config.json" in refused()


def test_export_writes_a_whole_model(small, trained, run_of_two, tmp_path, capsys):
    run_dir, checkpoint = run_of_two
    logits = {}
    for source in (POLICY, MOMENTUM):
        peft = PeftModel.from_pretrained(base(), checkpoint / source)
        out = tmp_path / source
        flags = ["--momentum"] if source == MOMENTUM else []
        assert export.main([str(run_dir), "--out", str(out), *flags]) == 0
        whole = AutoModelForCausalLM.from_pretrained(out)
        logits[source] = whole(IDS).logits
        torch.testing.assert_close(logits[source], peft(IDS).logits, rtol=1e-4, atol=1e-4)
        assert AutoTokenizer.from_pretrained(out).encode("1+2=") == [3, 12, 4, 14]
        assert [name for name, _ in whole.named_parameters()] == [name for name, _ in base().named_parameters()]
    assert not torch.allclose(logits[POLICY], logits[MOMENTUM], atol=1e-4)
    assert export.main([str(checkpoint / "policy"), "--out", str(tmp_path / "bf16"), "--dtype", "bf16"]) == 0
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto")
    assert rounded.dtype == torch.bfloat16
    capsys.readouterr()
    for arguments, message in {
        (str(run_dir), str(tmp_path / "policy")): "--out must be a new or empty folder",
        (str(checkpoint / "policy"), str(tmp_path / "x"), "--momentum"): "needs a run or a checkpoint",
        (str(tmp_path / "policy"), str(tmp_path / "x")): "must be a run with a checkpoint, a checkpoint or an adapter",
    }.items():
        source, out, *flags = arguments
        assert export.main([source, "--out", out, *flags]) == 2
        assert message in capsys.readouterr().err
    path = checkpoint / POLICY_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert export.main([str(checkpoint), "--out", str(tmp_path / "x")]) == 2
    assert "other bytes" in capsys.readouterr().err


def test_evaluate_takes_adapters_and_names_those_of_a_run(run_of_two, tmp_path, capsys):
    run_dir, checkpoint = run_of_two
    probe = ["--data.probe", "arithmetic:8:2-3:5", "--samples", "2", "--rollout.max-new-tokens", "24"]
    probe += ["--answer.extract", r"regex:#(\d\d)", "--answer.equivalence", "exact"]
    assert export.main([str(run_dir), "--out", str(tmp_path / "whole")]) == 0
    results = []
    for path in (checkpoint / "policy", tmp_path / "whole"):
        out = tmp_path / "result.json"
        assert evaluate.main(["--model.path", str(path), *probe, "--out", str(out)]) == 0
        results.append(json.loads(out.read_text())["evaluation"])
    assert results[0] == results[1]
    capsys.readouterr()
    assert evaluate.main(["--model.path", str(run_dir), *probe]) == 2
    assert f"Name {checkpoint / 'policy'} or {checkpoint / 'momentum'}" in capsys.readouterr().err


def test_the_dry_run_counts_what_is_trained_and_lists_problems(launch, tmp_path, capsys):
    assert launch(LORA, "--dry-run") == 0
    said = capsys.readouterr().out
    model = load_model(ModelConfig(device="cpu")).model
    shapes = [m.weight.shape for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert f"{3 * sum(a + b for a, b in shapes):,}" in said and "trained parameters (LoRA)" in said
    assert "frozen weights (fp32)" in said and "initial weights" not in said
    assert launch(LORA | {"lora.targets": "nothing", "data.train": tmp_path / "none"}, "--dry-run") == 2
    problems = capsys.readouterr().err
    assert "nothing matches nothing" in problems and str(tmp_path / "none") in problems
    assert launch({"lora.alpha": 3}, "--dry-run") == 2
    assert "--lora.alpha needs --lora.rank" in capsys.readouterr().err


def test_the_report_says_how_much_is_trained(small, trained, tmp_path):
    from mgrpo.observe.report import write_report
    from mgrpo.observe.trackers import to_json

    _, rows = trained(small(LORA), 1)
    (tmp_path / "metrics.jsonl").write_text(to_json(rows[0]) + "\n")
    page = write_report([tmp_path]).read_text()
    assert f"trained parameters (LoRA) <b>{rows[0]['trained_parameters']:,}</b>" in page
