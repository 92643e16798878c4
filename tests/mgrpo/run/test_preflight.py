"""What a run and --dry-run find before the first step, in the same words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from mgrpo import doctor, evaluate
from mgrpo.config import Config, ModelConfig
from mgrpo.errors import ConfigError, InputError, StorageError, whole
from mgrpo.models.files import check_folder
from mgrpo.models.load import load_model
from mgrpo.models.save import make_savable, try_save
from mgrpo.models.size import cache_numbers
from mgrpo.models.tokenizer import resolve_path
from mgrpo.run.directory import directory_of, refuse_directory, require_room
from mgrpo.run.preflight import find_problems
from mgrpo.tasks.arithmetic import make_tokenizer
from mgrpo.training.trainer import Trainer

SHORT = {"steps": 1, "rollout.max_new_tokens": 4}


def said(capsys):
    """What was printed on stderr, a line each, those of transformers left out."""
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[transformers]")]


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped model."""
    return Path(shutil.copytree(resolve_path("builtin:arithmetic"), tmp_path / "model"))


@pytest.fixture
def refused(launch, tmp_path, capsys):
    """The line with which both --dry-run and a run refuse options, leaving nothing behind."""

    def refuse(options, *flags):
        before = sorted(tmp_path.iterdir())
        lines = []
        for dry in ([], ["--dry-run"]):
            assert launch(SHORT | options, *flags, *dry) == 2
            lines += said(capsys)
            assert sorted(tmp_path.iterdir()) == before
        assert len(lines) == 2 and lines[0] == lines[1], lines
        return lines[0]

    return refuse


def edit(path, **changes):
    """Changes keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    """Changes the tensors of a folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("values", "dropped"),
    [
        ({"temperature": 0.7, "top_p": 0.9}, ["temperature", "top_p"]),
        ({"do_sample": True, "temperature": 0.7, "early_stopping": True}, ["early_stopping"]),
        ({"pad_token_id": -1, "eos_token_id": [1]}, ["pad_token_id"]),
        ({"output_scores": True, "length_penalty": 0.5}, ["length_penalty", "output_scores"]),
        ({"do_sample": True, "top_k": 3}, []),
    ],
)
def test_clashing_generation_values_are_left_out_of_what_is_saved(values, dropped):
    model = SimpleNamespace(generation_config=GenerationConfig(**values))
    assert make_savable(model) == dropped
    model.generation_config.validate(strict=True)
    kept = model.generation_config.to_diff_dict()
    assert {name: kept.get(name) for name in values if name not in dropped} == {
        name: value for name, value in values.items() if name not in dropped
    }
    assert not kept.keys() & set(dropped)


def test_a_model_with_clashing_generation_values_is_saved(launch, folder, tmp_path, capsys):
    edit(folder / "generation_config.json", temperature=0.6, top_k=20)
    assert launch(SHORT | {"model.path": folder}, "--dry-run") == 0
    first = said(capsys)
    assert first == [
        f"model: generation_config.json of {folder} is saved without temperature, top_k: its values contradict one "
        "another, and transformers does not write them."
    ]
    assert launch(SHORT | {"model.path": folder}) == 0
    assert said(capsys)[:1] == first
    for source in ("policy", "momentum"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "step_1" / source)


class Unsavable:
    """A tokenizer that can not be written."""

    def __init__(self, error):
        self.error = error

    def save_pretrained(self, folder):
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (NotImplementedError("no vocabulary\nin this class"), InputError, "failed with: no vocabulary in this class"),
        (TypeError("set is not JSON"), InputError, "saving failed with: TypeError: set is not JSON"),
        (OSError(28, "No space left on device"), StorageError, "must take what is written, got: .*No space left"),
        (Exception("No space left on device (os error 28)"), StorageError, "No space left on device"),
    ],
)
def test_what_can_not_be_saved_is_told_of(tmp_path, error, kind, message):
    model = tiny_model("qwen3")
    with pytest.raises(kind, match=message):
        try_save(tmp_path / "trial", model, {"policy": model.state_dict()}, Unsavable(error))


def test_a_trial_save_takes_no_room_and_the_names_of_all_tensors(tmp_path):
    model = tiny_model("gpt2")
    weights = model.state_dict()
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()
    try_save(tmp_path, model, {"policy": weights, "momentum": weights}, make_tokenizer())
    for source in ("policy", "momentum"):
        thin = load_file(tmp_path / source / "model.safetensors")
        assert thin.keys() == weights.keys() - {"lm_head.weight"}
        assert all(tensor.shape[-1] == 1 for tensor in thin.values())


def test_shared_memory_that_is_no_tie_is_found_by_a_trial_save(tmp_path):
    model = tiny_model("llama")
    weights = model.state_dict()
    weights["model.layers.0.mlp.gate_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(InputError, match="saving failed with: The weights trying to be saved contained shared tensors"):
        try_save(tmp_path, model, {"policy": weights}, make_tokenizer())


def test_a_run_that_can_not_save_ends_before_its_first_step(refused, monkeypatch):
    def fail(*args, **options):
        raise ValueError("this model\nhas no words")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    assert refused({}) == "model: the model must be savable, saving failed with: this model has no words."


def test_the_rehearsal_changes_nothing(small, monkeypatch, tmp_path):
    from mgrpo.run.preflight import rehearse

    trainer = Trainer(small({"model.dtype": "bf16"}))
    monkeypatch.setattr(trainer, "config", small({}))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    state = torch.get_rng_state()
    rehearse(trainer, tmp_path)
    assert torch.equal(torch.get_rng_state(), state) and list(tmp_path.iterdir()) == []
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    trainer.close()


@pytest.mark.parametrize("where", ["generate", "backward"])
def test_a_model_that_can_not_take_a_step_is_refused(refused, monkeypatch, where):
    def fail(*args, **options):
        raise IndexError("index out of range\nin self")

    target = "mgrpo.rollout.transformers.TransformersEngine.generate"
    monkeypatch.setattr(target if where == "generate" else "mgrpo.models.forward.Forward.__call__", fail)
    message = "must generate a token and have a gradient, got: IndexError: index out of range in self."
    assert refused({}) == f"model: builtin:arithmetic {message}"


LOST = {
    "a tensor": (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "it lacks model.layers.1.mlp.up_proj.weight."),
    "a layer": (
        lambda w: [w.pop(name) for name in list(w) if "layers.0." in name],
        "it lacks model.layers.0.input_layernorm.weight, ",
    ),
    "another shape": (
        lambda w: w.update({"model.norm.weight": torch.ones(7)}),
        "got model.norm.weight (7,) in place of (96,).",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_a_folder_that_lacks_parameters_is_refused(refused, folder, capsys, name):
    change, message = LOST[name]
    change_weights(folder, change)
    line = refused({"model.path": folder})
    assert line.startswith(f"model: {folder} must hold ") and message in line
    arguments = ["--model.path", str(folder), "--data.probe", "arithmetic:2:2:0", "--samples", "1"]
    assert evaluate.main(arguments) == 2
    assert said(capsys) == [line]


def test_a_checkpoint_that_lacks_a_parameter_is_not_resumed(launch, resume, tmp_path, monkeypatch, capsys):
    assert launch({"steps": 2, "checkpoint.every": 1}, "--stop-after", "1") == 0
    policy = tmp_path / "run" / "checkpoints" / "step_1" / "policy"
    change_weights(policy, lambda w: w.pop("model.norm.weight"))
    monkeypatch.setattr("mgrpo.run.checkpoint._sha256", lambda path: "")
    monkeypatch.setattr("mgrpo.run.checkpoint.verify_checkpoint", lambda folder: 1)
    capsys.readouterr()
    assert resume() == 2
    assert said(capsys) == [
        f"model: {policy} must hold every parameter of the model, it lacks model.norm.weight. "
        "Fetch or convert the folder again."
    ]


INDEXES = {
    "no map": ({"metadata": {}}, "must hold metadata and a weight_map of tensors to files, got keys metadata."),
    "nothing": ({}, "must hold metadata and a weight_map of tensors to files, got keys none."),
    "a list": ({"metadata": {}, "weight_map": ["a"]}, "got keys metadata, weight_map."),
    "no names": ({"metadata": {}, "weight_map": {"a": None}}, "got keys metadata, weight_map."),
    "no file": ({"metadata": {}, "weight_map": {"a": "1.safetensors"}}, "names, it lacks 1.safetensors."),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_of_weights_must_name_files_that_are_there(refused, folder, name):
    content, message = INDEXES[name]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(content))
    check_folder(str(folder))  # nobody reads it beside the weights
    (folder / "model.safetensors").unlink()
    line = refused({"model.path": folder})
    assert message in line and index.name in line


def test_a_model_and_an_adapter_in_one_folder_are_refused(refused, folder):
    (folder / "adapter_config.json").write_text("{}")
    line = refused({"model.path": folder})
    assert line.startswith(f"model: --model.path must be a whole model or an adapter, {folder} holds both, config.json")


def test_tied_names_and_tensors_too_many_are_no_loss(launch, folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    change_weights(folder, lambda w: w.update({"extra.weight": torch.ones(3)}))
    assert launch(SHORT | {"model.path": folder}) == 0


@pytest.mark.parametrize("token", ["pad_token", "eos_token", "unk_token"])
def test_special_tokens_must_have_a_row(refused, folder, token):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({token: "<new>"})
    tokenizer.save_pretrained(folder)
    line = refused({"model.path": folder})
    assert line.startswith(f"model: {token} of {folder} must be below 17, the rows of its embedding, got 17.")


def test_the_first_prompt_without_a_row_is_named(refused, folder, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["7+7"])
    tokenizer.save_pretrained(folder)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}=", "answer": "1"}) + "\n" for n in ("1+1", "2+2", "7+7", "3")))
    line = refused({"model.path": folder, "data.train": data})
    assert line.startswith(
        f"{data}: tokens must be below 17, the rows of the model's embedding, prompt 3 has 17: '7+7='."
    )
    assert evaluate.main(["--model.path", str(folder), "--data.probe", str(data), "--samples", "1"]) == 2
    assert said(capsys) == [line]


def test_positions_after_the_paddings_are_the_context(refused, folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    shape = RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=32, pad_token_id=1, is_decoder=True, **sizes
    )
    RobertaForCausalLM(shape).save_pretrained(folder)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("1+1=", "1" * 27)))
    line = refused({"model.path": folder, "data.train": data, "rollout.num_prompts": 2})
    assert "26" in line and "27" in line
    loaded = load_model(ModelConfig(path=str(folder)))
    assert loaded.context_length == 30


def test_rows_too_many_are_fine(launch, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(40)
    model.save_pretrained(folder)
    assert launch(SHORT | {"model.path": folder}) == 0


EOS = {
    '"<eos>"': "got '<eos>'. Write 1, which is its id.",
    '["<eos>", 1]': "got ['<eos>', 1]. Write 1, which is its id.",
    '"<none>"': "got '<none>'. Write the token's id.",
    '{"a": 1}': "got {'a': 1}. Write the token's id.",
    "true": "got True. Write the token's id.",
    "1.0": "got 1.0. Write the token's id.",
}


@pytest.mark.parametrize("value", EOS)
def test_eos_must_be_an_id(refused, folder, value):
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    line = refused({"model.path": folder})
    place = f"model: eos_token_id in generation_config.json of {folder} must be a token id or a list of them, "
    assert line == place + EOS[value]


FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


@pytest.mark.parametrize("content", ["junk", "", "[1]", "\x00"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_json_object_is_named(refused, folder, name, content):
    (folder / name).write_text(content)
    assert refused({"model.path": folder}).startswith(f"model: {folder / name} must hold ")


VALUES = [
    ("config.json", {"eos_token_id": "<eos>"}, "value '<eos>' doesn't match any type in"),
    ("config.json", {"hidden_size": "96"}, "'hidden_size' expected int, got str"),
    ("config.json", {"num_attention_heads": 0}, "ZeroDivisionError"),
    ("config.json", {"model_type": "abacus"}, "model type `abacus`"),
    ("generation_config.json", {"max_new_tokens": "9"}, "TypeError: "),
    ("generation_config.json", {"num_return_sequences": 3}, "Greedy methods"),
    ("tokenizer_config.json", {"model_max_length": "long"}, "TypeError: "),
    ("tokenizer_config.json", {"eos_token": 1}, "TypeError: Special token eos_token has to be"),
]


@pytest.mark.parametrize(("name", "values", "message"), VALUES)
def test_values_of_another_type_are_refused(refused, folder, name, values, message):
    edit(folder / name, **values)
    line = refused({"model.path": folder})
    assert str(folder) in line and message in line
    assert name in line or name == "tokenizer_config.json"


def test_an_error_of_several_lines_is_kept_whole():
    assert whole(ValueError("Couldn't make one of:\n (1) a file\n (2) a folder.\n")) == (
        "Couldn't make one of: (1) a file (2) a folder"
    )
    assert whole(OSError("one of:\n")) == "one of"
    assert whole(KeyError("x")) == "KeyError: 'x'"
    assert whole(TypeError()) == "TypeError"
    assert len(whole(ValueError("many words " * 1000))) < 2100


@pytest.mark.parametrize("given", ["./modle", "{dir}/modle", "models/foo", "a/b/c", "my model", "file"])
def test_a_wrong_path_is_refused_without_asking_the_hub(folder, tmp_path, monkeypatch, given):
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **options: pytest.fail("asks the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "file").touch()
    given = given.replace("{dir}", str(tmp_path))
    with pytest.raises(InputError) as caught:
        check_folder(given)
    what = "is a file. Name its folder." if given == "file" else "does not exist."
    message = str(caught.value)
    assert message.startswith(f"model: --model.path must be a model folder or a hub id, {given} {what}")
    assert message.endswith(f" Did you mean {Path(given).with_name('model')}?") == given.endswith(("modle", "my model"))


def test_an_id_that_the_hub_may_have_is_no_wrong_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("gpt2", "Qwen/Qwen3-4B-Base", "builtin:arithmetic"):
        check_folder(path)


def test_a_hub_that_is_not_reached_is_told_of_in_one_line(tmp_path):
    code = "import sys; from mgrpo.evaluate import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--data.probe", "arithmetic:2:2:0", "--model.path", "no-owner/no-model"]
    offline = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("model: no-owner/no-model must be a model folder or a reachable hub id, got: ")


def test_a_folder_without_weights_names_the_files_that_are_looked_for(launch, folder, tmp_path, capsys):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    files = "model.safetensors, or as model.safetensors.index.json with the files it names"
    for got in ("only pytorch_model.bin. Convert or rename them.", "neither. Fetch the weights too."):
        assert launch(SHORT | {"model.path": folder}) == 2
        assert said(capsys) == [f"model: {folder} must hold its weights as {files}, got {got}"]
        (folder / "pytorch_model.bin").unlink(missing_ok=True)


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/step_1"])
def test_the_folder_of_a_run_names_the_models_in_it(launch, refused, tmp_path, capsys, part):
    assert launch(SHORT, run_dir=tmp_path / "before") == 0
    capsys.readouterr()
    newest = tmp_path / "before" / "checkpoints" / "step_1"
    given = tmp_path / "before" / part
    line = refused({"model.path": given})
    assert line.startswith(f"model: --model.path must be a model folder, {given} is the folder of a ")
    assert line.endswith(f". Name {newest / 'policy'} or {newest / 'momentum'}.")
    assert evaluate.main(["--model.path", str(given), "--data.probe", "arithmetic:2:2:0", "--samples", "1"]) == 2
    assert said(capsys) == [line]


def test_a_state_space_model_has_a_plan_without_a_cache(launch, tmp_path, capsys):
    tokenizer = make_tokenizer()
    shape = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "eos_token_id": 1}
    MambaForCausalLM(MambaConfig(**shape, pad_token_id=0)).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    code = launch(SHORT | {"model.path": tmp_path / "mamba", "model.attn_implementation": "eager"}, "--dry-run")
    out, err = capsys.readouterr()
    assert "parameters" in out and "KV cache" not in out
    assert code == 0 or (code in (2, 5) and "Traceback" not in err)


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ({}, 0),
        ({"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 3}, 2 * 3 * 32),
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3}, 2 * 3 * 2 * 16),
        ({"num_attention_heads": [2, 4], "num_key_value_heads": [1, 2], "head_dim": 8, "num_hidden_layers": 2}, 64),
        ({"num_attention_heads": "4", "hidden_size": 32, "num_hidden_layers": 3}, 0),
        ({"num_attention_heads": 0, "hidden_size": 32, "num_hidden_layers": 3}, 0),
        ({"num_attention_heads": 4, "hidden_size": 32, "layer_types": ["linear_attention", "full_attention"]}, 64),
        ({"num_attention_heads": 4, "hidden_size": 32, "layers_block_type": ["mamba", "attention", "mamba"]}, 64),
    ],
)
def test_the_cache_is_counted_from_what_a_configuration_has(values, numbers):
    assert cache_numbers(SimpleNamespace(**values)) == numbers  # pyright: ignore


def test_a_configuration_that_makes_no_model_has_a_plan(launch, folder, capsys):
    edit(folder / "config.json", model_type="t5", d_model=8, num_heads=2, d_kv=4, num_layers=1)
    assert launch(SHORT | {"model.path": folder}, "--dry-run") == 2
    out, err = capsys.readouterr()
    assert "not known before the model is loaded" in out
    assert "Unrecognized configuration class" in err and "Traceback" not in err


DEVICES = ("mps", "xpu", "xla", "meta", "gpu", "CPU", "cpu:1", "cuda:x", "cuda:-1", "hpu", "")


@pytest.mark.parametrize("device", DEVICES)
def test_devices_that_are_not_supported_are_refused(refused, device):
    line = refused({}, f"--model.device={device}")
    assert line == f"config: --model.device must be auto, cpu or cuda[:N], got {device}."


def test_a_gpu_beyond_the_last_is_refused(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert refused({}, "--model.device", "cuda:2") == (
        "config: --model.device must be one of 2 GPUs, from cuda:0 on, got cuda:2."
    )


def test_a_run_directory_must_be_one_that_can_be_made(refused, tmp_path):
    (tmp_path / "gone").symlink_to("nowhere/at/all")
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("gone", "gone/below"):
        assert refused({}, "--run-dir", str(tmp_path / name)) == (
            f"run: --run-dir must be a directory, the link {tmp_path / 'gone'} has no target: nowhere/at/all."
        )
    for name in ("file", "file/below", "file/a/b"):
        message = f"run: --run-dir must be a directory, {tmp_path / 'file'} is a file."
        assert refused({}, "--run-dir", str(tmp_path / name)) == message
    assert "has no target" in refused({}, "--run-dir", str(tmp_path / "loop"))
    assert "must be a directory that can be created" in refused({}, "--run-dir", str(tmp_path / ("n" * 300)))
    assert "home of a known user, got ~nobodyhere/run" in refused({}, "--run-dir", "~nobodyhere/run")


def test_a_link_to_a_folder_is_a_run_directory(launch, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert launch(SHORT, run_dir=tmp_path / "link") == 0
    assert (tmp_path / "real" / "metrics.jsonl").is_file()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_parent_that_may_not_be_written_is_named(tmp_path):
    parent = tmp_path / "closed"
    parent.mkdir(mode=0o555)
    for folder in list(tmp_path.parents)[:-1]:
        folder.chmod(folder.stat().st_mode | 0o111)
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match=f"must be writable, {parent} is not"):
            refuse_directory(parent / "run", Config())
    finally:
        os.seteuid(0)


def test_a_run_needs_room_for_two_checkpoints(tmp_path, monkeypatch, small):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 2**30))
    several, single = small({"steps": 9, "checkpoint.every": 3}), small({"steps": 9, "checkpoint.every": 0})
    require_room(tmp_path / "run", single, 3 * 2**30)
    require_room(tmp_path / "run", several, 2**30)
    message = f"room for two checkpoints of 2.0 GiB, {tmp_path} has 3.0 GiB free"
    with pytest.raises(ConfigError, match=message):
        require_room(tmp_path / "run", several, 2 * 2**30)
    with pytest.raises(ConfigError, match=r"room for a checkpoint of 4\.0 GiB"):
        require_room(tmp_path / "run", single, 4 * 2**30)


def test_what_a_killed_trial_left_is_nothing(launch, tmp_path):
    (tmp_path / "run" / ".trial-x").mkdir(parents=True)
    (tmp_path / "run" / ".trial-x" / "config.json").touch()
    assert launch(SHORT) == 0
    assert not list((tmp_path / "run").glob(".trial*"))


def test_a_tilde_is_the_home_folder(launch, tmp_path, monkeypatch, capsys):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(), work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    shutil.copytree(resolve_path("builtin:arithmetic"), home / "model")
    (home / "data.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 4)
    options = {"model.path": "~/model", "data.train": "~/data.jsonl", "data.probe": "~/data.jsonl"}
    assert launch(SHORT | options, run_dir=Path("~/run")) == 0
    config = json.loads((home / "run" / "config.json").read_text())
    assert config["model"]["path"] == f"{home}/model" and config["data"]["probe"] == f"{home}/data.jsonl"
    from mgrpo.train import main

    assert main(["--resume", "--run-dir=~/run"]) == 0
    arguments = [
        "--model.path=~/run/checkpoints/step_1/policy",
        "--data.probe=~/data.jsonl",
        "--samples=1",
        "--out=~/o.json",
    ]
    assert evaluate.main(arguments) == 0 and (home / "o.json").is_file()
    from mgrpo import report

    assert report.main(["~/run", "--out=~/report"]) == 0 and (home / "report" / "report.html").is_file()
    assert list(work.iterdir()) == []


def test_a_path_without_a_tilde_stays(monkeypatch):
    from mgrpo.train import parse

    assert parse(["--model.path", "owner/name~1", "--run-dir", "a/~b"]).model.path == "owner/name~1"
    assert parse(["--run-dir", "a/~b"]).run_dir == "a/~b" and parse(["--run-dir", "None"]).run_dir is None
    assert directory_of(parse(["srt"])).parts[0] == "runs"


def test_doctor_tells_what_stands_in_the_way(folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1+1="}\n')
    model, prompts = doctor.ModelConfig(path=str(folder)), doctor.DataConfig(train=str(data))
    assert doctor.check_given(model, prompts) == []
    assert doctor.check_given(doctor.ModelConfig(), prompts) == []
    change_weights(folder, lambda w: w.pop("model.norm.weight"))
    (problem,) = doctor.check_given(model, prompts)
    assert problem.startswith(f"model: {folder} must hold every parameter of the model, it lacks model.norm.weight.")
    for given in (model, doctor.ModelConfig()):
        (problem,) = doctor.check_given(given, doctor.DataConfig(train=str(data), prompt_key="question"))
        assert "record must have the key 'question'" in problem


def test_a_dry_run_ends_in_no_traceback_in_a_process_of_its_own(folder):
    """The command itself: exit code 2, and one line on stderr."""
    (folder / "generation_config.json").write_text("junk")
    command = [sys.executable, "-m", "mgrpo.train", "--model.path", str(folder), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distributed.processes": 4, "distributed.replicate": 2}, None),
        ({"distributed.processes": 2, "distributed.reduce": "tree"}, None),
        ({"distributed.replicate": 2}, "--distributed.replicate must divide the number of processes (1), got 2."),
    ],
)
def test_options_are_checked_against_the_processes_that_the_run_will_have(small, options, message):
    problems = [problem for problem in find_problems(small(options)) if "--distributed" in problem]
    assert problems == ([f"config: {message}"] if message else [])
