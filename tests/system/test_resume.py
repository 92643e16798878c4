from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import call
from transformers import AutoModelForCausalLM, AutoTokenizer

from mgrpo.errors import CheckpointError, ConfigError, Exit
from mgrpo.models.tokenizer import resolve_path
from mgrpo.process.disk import list_checkpoints, step_of
from mgrpo.run.checkpoint import verify_checkpoint
from mgrpo.run.loop import run
from mgrpo.training.grader import Grader
from mgrpo.training.passes import Passes
from mgrpo.training.trainer import Trainer

# Everything that is carried from step to step: a schedule, moments, a momentum of its own, a filter, an epoch's end.
CARRYING = {
    "steps": 6,
    "data.train": "arithmetic:10:2-3:0",
    "optim.schedule": "cosine",
    "optim.warmup_ratio": 0.3,
    "optim.lr": 1e-3,
    "optim.num_minibatches": 2,
    "momentum.every": 3,
    "momentum.decay": 0.8,
    "momentum.schedule": "cosine",
    "objective.kl_coef": 0.05,
    "objective.kl_reference": "initial",
    "data.probe": "arithmetic:4:2-3:5",
    "eval.every": 2,
    "eval.samples": 1,
}


def contents(folder):
    """Every tensor of a checkpoint and its state, by file."""
    files = {str(p.relative_to(folder)): load_file(p) for p in sorted(folder.rglob("*.safetensors"))}
    state = json.loads((folder / "state.json").read_text())
    del state["rng"]  # of this process, and no draw of a run comes from it
    return files, state


def flip_a_byte(path, position=-7):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def steps_saved(run_dir):
    return [step_of(folder) for folder in list_checkpoints(run_dir)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16-kahan", "bf16-stochastic"])
def test_a_resumed_run_is_the_straight_one(launch, resume, tmp_path, rows_of, capsys, dtype):
    options = CARRYING | {"momentum.dtype": dtype}
    assert launch(options, run_dir=tmp_path / "straight") == 0
    assert launch(options, "--stop-after", "3") == 0
    assert steps_saved(tmp_path / "run") == [3]
    capsys.readouterr()
    assert resume("--stop-after", "6") == 0
    assert "step 3 of 6, weights, optimiser and sampler from" in " ".join(capsys.readouterr().out.split())
    (straight, state), (resumed, other_state) = (
        contents(tmp_path / name / "checkpoints" / "step_6") for name in ("straight", "run")
    )
    expected = {"policy/model.safetensors", "momentum/model.safetensors", "optimizer.safetensors"}
    assert (
        straight.keys()
        == resumed.keys()
        == expected | ({"momentum_compensation.safetensors"} if dtype == "bf16-kahan" else set())
    )
    for file, tensors in straight.items():
        for name, tensor in tensors.items():
            assert tensor.dtype == resumed[file][name].dtype and torch.equal(tensor, resumed[file][name]), (file, name)
    assert state == other_state
    assert any((t != 0).any() for t in straight["optimizer.safetensors"].values())
    assert rows_of(tmp_path / "straight") == rows_of(tmp_path / "run")
    assert len(rows_of(tmp_path / "run")) == 6
    start, end = (contents(tmp_path / "run" / "checkpoints" / f"step_{step}")[0] for step in (3, 6))
    for source in ("policy", "momentum"):
        file = f"{source}/model.safetensors"
        assert not all(torch.equal(start[file][name], end[file][name]) for name in start[file]), source


def test_global_generators_go_on_where_they_were(small, trained, tmp_path):
    trainer, _ = trained(small(), 1)
    trainer.save(tmp_path)
    drawn = [(random.random(), np.random.rand(), torch.rand(1).item()) for _ in range(2)]
    trainer.restore(tmp_path)
    assert [(random.random(), np.random.rand(), torch.rand(1).item()) for _ in range(2)] == drawn
    assert drawn[0] != drawn[1]


def test_resume_goes_to_the_end_after_stop_after(launch, resume, tmp_path, rows_of):
    assert launch({"steps": 4}, "--stop-after", "2") == 0
    assert resume() == 0
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4]
    assert steps_saved(tmp_path / "run") == [2, 4]


def test_a_finished_run_resumes_to_nothing(launch, resume, tmp_path, rows_of):
    assert launch({"steps": 2}) == 0
    before = rows_of(tmp_path / "run", clocks=True)
    assert resume() == 0
    assert rows_of(tmp_path / "run", clocks=True) == before and steps_saved(tmp_path / "run") == [2]


def test_resume_in_an_empty_directory_starts(launch, resume, tmp_path, rows_of, capsys):
    assert launch({"steps": 1}, "--resume") == 0
    assert "holds no checkpoint, starting from step 0" in " ".join(capsys.readouterr().out.split())
    assert len(rows_of(tmp_path / "run")) == 1


@pytest.fixture
def run_of_two(launch, tmp_path):
    """A run that ended after 2 of 4 steps, on a file of data, with a checkpoint of each step."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": f"{2 * i}"}) + "\n" for i in range(10, 18)))
    assert launch({"steps": 4, "checkpoint.every": 1, "data.train": data}, "--stop-after", "2") == 0
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim.lr", "1e-3"], "--optim.lr must be 0.0002, as the run was started, got 0.001."),
        (["--data.train", "arithmetic:24:2-3:1"], "--data.train must be"),
        (["--rollout.num-policy", "5"], "--rollout.num-policy must be 4, as the run was started, got 5."),
        (["--seed", "1"], "--seed must be 0, as the run was started, got 1."),
        (["--momentum.dtype", "bf16-kahan"], "--momentum.dtype must be fp32, as the run was started, got bf16-kahan."),
        (["--steps", "5"], "--steps must be 4, as the run was started, got 5. Add --resume-extend to change it."),
    ],
)
def test_another_computation_is_refused_by_name(resume, run_of_two, capsys, rows_of, flags, message):
    assert resume("--stop-after", "4", *flags) == 2
    assert f"resume: {message}" in " ".join(capsys.readouterr().err.split())
    assert len(rows_of(run_of_two)) == 2


def test_every_refused_option_is_listed(resume, run_of_two, capsys):
    assert resume("--optim.lr", "1", "--seed", "7", "--filter.k", "3") == 2
    text = capsys.readouterr().err
    assert all(name in text for name in ("--optim.lr must", "--seed must", "--filter.k must"))


def test_other_prompts_in_the_same_file_are_refused(resume, run_of_two, capsys):
    data = run_of_two.parent / "train.jsonl"
    data.write_text(data.read_text().replace("10+10=", "10+11="))
    assert resume("--stop-after", "4") == 2
    assert "--data.train must hold the prompts that" in capsys.readouterr().err
    assert steps_saved(run_of_two) == [1, 2]


def test_another_preset_is_refused(resume, run_of_two, capsys):
    from mgrpo.train import main

    assert main(["srt", "--resume", "--run-dir", str(run_of_two)]) == 2
    assert "PRESET must be mgrpo_arithmetic, as the run was started, got srt." in capsys.readouterr().err


def test_what_is_watched_and_kept_may_change(resume, run_of_two, rows_of):
    flags = ["--stop-after", "4", "--checkpoint.keep-last", "5", "--monitor.window", "3", "--log.kl-initial-every", "1"]
    assert resume(*flags) == 0
    assert steps_saved(run_of_two) == [1, 2, 3, 4]
    assert [row["kl_initial"] is None for row in rows_of(run_of_two)] == [True, True, False, False]


def test_more_steps_need_and_take_resume_extend(resume, run_of_two, rows_of, capsys):
    assert resume("--steps", "5", "--resume-extend", "--stop-after", "5") == 0
    assert len(rows_of(run_of_two)) == 5
    assert resume("--steps", "6", "--stop-after", "6") == 2
    assert "--steps must be 5, as the run was started, got 6. Add --resume-extend" in capsys.readouterr().err


FILES = ["policy/model.safetensors", "momentum/model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("name", [*FILES, "policy/tokenizer.json"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(resume, run_of_two, rows_of, capsys, name):
    path = run_of_two / "checkpoints" / "step_2" / name
    flip_a_byte(path)
    assert resume("--stop-after", "3") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"resume: skipped checkpoint: {path} must be as it was written, got other bytes or no file." in text
    assert f"step 1 of 4, weights, optimiser and sampler from {run_of_two}/checkpoints/step_1" in text
    assert [row["step"] for row in rows_of(run_of_two)] == [1, 2, 3]


@pytest.mark.parametrize("position", [3, 30, -3])
def test_a_damaged_manifest_is_a_damaged_checkpoint(resume, run_of_two, capsys, position):
    path = run_of_two / "checkpoints" / "step_2" / "manifest.json"
    content = bytearray(path.read_bytes())
    content[position] ^= 0x80
    path.write_bytes(content)
    assert resume("--stop-after", "3") == 0
    assert "step 1 of 4" in capsys.readouterr().out


def test_a_manifest_without_digests_is_a_damaged_checkpoint(resume, run_of_two, capsys):
    path = run_of_two / "checkpoints" / "step_2" / "manifest.json"
    path.write_text(path.read_text().replace('"sha256"', '"shb256"'))
    assert resume("--stop-after", "3") == 0
    assert "step 1 of 4" in capsys.readouterr().out


def test_a_missing_file_is_a_damaged_checkpoint(resume, run_of_two, capsys):
    (run_of_two / "checkpoints" / "step_2" / "state.json").unlink()
    assert resume("--stop-after", "3") == 0
    assert "step_2/state.json must be as it was written" in "".join(capsys.readouterr().out.split("\n"))


def test_the_retake_of_damaged_steps_is_the_straight_run(resume, run_of_two, tmp_path, rows_of):
    shutil.copytree(run_of_two, tmp_path / "sound")
    flip_a_byte(run_of_two / "checkpoints" / "step_2" / "state.json")
    for run_dir in (run_of_two, tmp_path / "sound"):
        assert resume("--stop-after", "4", run_dir=run_dir) == 0
    assert rows_of(run_of_two) == rows_of(tmp_path / "sound")
    retaken, sound = (contents(d / "checkpoints" / "step_4")[0] for d in (run_of_two, tmp_path / "sound"))
    for file, tensors in sound.items():
        assert all(torch.equal(tensor, retaken[file][name]) for name, tensor in tensors.items()), file


def test_a_damaged_checkpoint_never_crowds_out_a_sound_one(launch, resume, run_of_two, monkeypatch):
    flip_a_byte(run_of_two / "checkpoints" / "step_2" / "state.json")
    shutil.copytree(run_of_two / "checkpoints" / "step_2", run_of_two / "checkpoints" / "step_3")
    snapshot = Trainer.snapshot

    def die(trainer):
        if trainer.step == 3:
            raise KeyboardInterrupt
        return snapshot(trainer)

    monkeypatch.setattr(Trainer, "snapshot", die)
    flags = ["--stop-after", "4", "--checkpoint.keep-last", "1", "--checkpoint.keep-best", "0"]
    with pytest.raises(KeyboardInterrupt):
        resume(*flags)
    monkeypatch.setattr(Trainer, "snapshot", snapshot)
    assert resume(*flags) == 0


def test_a_checkpoint_damaged_a_second_time_is_put_away_again(resume, run_of_two, capsys):
    for last in ("3", "4"):
        flip_a_byte(run_of_two / "checkpoints" / "step_2" / "state.json")
        assert resume("--stop-after", last, "--checkpoint.keep-last", "5") == 0
        shutil.rmtree(run_of_two / "checkpoints" / f"step_{last}")
        shutil.rmtree(run_of_two / "checkpoints" / "step_3", ignore_errors=True)
    assert capsys.readouterr().out.count("resume: skipped") == 2


def test_a_manifest_of_another_step_is_damaged(run_of_two):
    manifest = run_of_two / "checkpoints" / "step_2" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))
    with pytest.raises(CheckpointError, match="must be of step 2, got 3"):
        verify_checkpoint(manifest.parent)


@pytest.mark.fault("kill -9 before the first checkpoint")
def test_a_run_that_died_before_its_first_checkpoint_starts_again(launch, resume, tmp_path, rows_of, monkeypatch):
    judge = Grader.assign_credit

    def die(self, batch, logprobs):
        if batch.step == 3:
            raise KeyboardInterrupt  # ends it at once, with nothing saved
        return judge(self, batch, logprobs)

    monkeypatch.setattr(Grader, "assign_credit", die)
    with pytest.raises(KeyboardInterrupt):
        launch({"steps": 4})
    monkeypatch.setattr(Grader, "assign_credit", judge)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
    assert resume() == 0
    assert launch({"steps": 4}, run_dir=tmp_path / "straight") == 0
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "straight")


@pytest.mark.parametrize("spelling", ["--run_dir", "--run-dir"])
def test_flags_with_underscores_are_checked_too(run_of_two, capsys, spelling):
    before = (run_of_two / "config.json").read_text()
    for directory in ([spelling, str(run_of_two)], [f"{spelling}={run_of_two}"]):
        assert call([*directory, "--resume", "--optim.lr", "0.5"]) == 2
        assert "--optim.lr must be 0.0002, as the run was started, got 0.5" in " ".join(capsys.readouterr().err.split())
    assert (run_of_two / "config.json").read_text() == before


def test_a_run_started_from_python_is_checked_too(small, run_of_two):
    options = {"steps": 4, "resume": True, "run_dir": str(run_of_two), "checkpoint.every": 1}
    with pytest.raises(ConfigError, match=r"--optim\.lr must be 0\.0002, as the run was started, got 0\.5"):
        run(small(options | {"data.train": str(run_of_two.parent / "train.jsonl"), "optim.lr": 0.5}))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"objective.reward": "labels"}, "data.train must hold the labels"),
        ({"data.probe": "probe.jsonl"}, "data.probe must hold the answers"),
        ({"log.kl_initial_every": 2}, "model.path must hold the weights"),
    ],
    ids=str,
)
def test_other_content_under_the_same_name_is_refused(launch, resume, tmp_path, capsys, changes, name):
    """Labels that are rewards, answers of a probe, and the initial model that a run is compared with."""
    data, model = tmp_path / "train.jsonl", tmp_path / "base"
    data.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": f"{2 * i}"}) + "\n" for i in range(10, 18)))
    shutil.copy(data, tmp_path / "probe.jsonl")
    shutil.copytree(resolve_path("builtin:arithmetic"), model)
    changes = {key: str(tmp_path / value) if value == "probe.jsonl" else value for key, value in changes.items()}
    options = {"steps": 4, "data.train": data, "model.path": model} | changes
    assert launch(options, "--stop-after", "2") == 0
    edited = {"data.train": data, "data.probe": tmp_path / "probe.jsonl"}.get(name.split()[0])
    if edited:
        edited.write_text(edited.read_text().replace('"answer": "20"', '"answer": "21"'))
    else:
        weights = load_file(model / "model.safetensors")
        weights["model.norm.weight"][0] += 1e-3
        save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert resume() == 2
    assert f"--{name} that {tmp_path}" in capsys.readouterr().err


def test_what_counts_in_a_row_is_restored(launch, resume, tmp_path, rows_of, monkeypatch):
    """Four steps that are not finite are too many, however many processes they took."""

    def bad_run(self, batch, run=Passes.run):
        logprobs = run(self, batch)
        logprobs.old.fill_(float("nan"))
        return logprobs

    monkeypatch.setattr(Passes, "run", bad_run)
    options = {"steps": 9, "optim.max_nonfinite": 4}
    assert launch(options, "--stop-after", "2") == 0
    assert resume("--stop-after", "9") == Exit.NON_FINITE
    assert [row["nonfinite_steps"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_no_sound_checkpoint_is_an_error(resume, run_of_two, capsys):
    for step in (1, 2):
        flip_a_byte(run_of_two / "checkpoints" / f"step_{step}" / "state.json")
    assert resume() == 2
    assert f"{run_of_two} must hold a valid checkpoint or nothing, got neither" in capsys.readouterr().err


@pytest.mark.fault("line of metrics cut off by a crash")
def test_a_line_cut_off_by_a_crash_is_dropped(resume, run_of_two, rows_of):
    metrics = run_of_two / "metrics.jsonl"
    kept = metrics.read_text()
    metrics.write_text(kept + kept.splitlines()[1].replace('"step": 2', '"step": 3')[:50])
    assert resume("--stop-after", "4") == 0
    assert [row["step"] for row in rows_of(run_of_two)] == [1, 2, 3, 4]
    assert metrics.read_text().startswith(kept)


def test_rows_past_the_checkpoint_are_taken_again(resume, run_of_two, rows_of):
    metrics = run_of_two / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 3, "stale": true}\n{"step": 4, "stale": true}\n')
    assert resume("--stop-after", "4") == 0
    rows = rows_of(run_of_two)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and not any("stale" in row for row in rows)


@pytest.mark.fault("disk full at the start")
def test_a_full_disk_at_the_start_leaves_the_configuration(resume, run_of_two, monkeypatch):
    """A configuration that can not be written anew must stay what it was, or the run can not be resumed again."""
    open_file = Path.open

    def fill(path, mode="r", *args, **options):
        if path.name.startswith("config.json") and mode == "w":
            with open_file(path, mode) as file:
                file.write("{")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open_file(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", fill)
    assert resume("--stop-after", "4") == 6
    monkeypatch.setattr(Path, "open", open_file)
    assert resume("--stop-after", "4") == 0


def test_broken_configuration_is_named(resume, run_of_two, capsys):
    (run_of_two / "config.json").write_text("{")
    assert resume() == 2
    assert f"{run_of_two}/config.json must be JSON" in "".join(capsys.readouterr().err.split("\n"))


def test_exported_models_hold_the_weights_of_the_run(small, trained, tmp_path):
    trainer, _ = trained(small({"optim.lr": 1e-3, "momentum.decay": 0.5}), 2)
    exported = export(trainer, tmp_path)
    for source, weights in exported.items():
        expected = dict(trainer.model.named_parameters()) if source == "policy" else trainer.momentum.weights
        for name, parameter in weights.items():
            assert torch.equal(parameter, expected[name]), (source, name)
    assert not torch.equal(exported["policy"]["model.norm.weight"], exported["momentum"]["model.norm.weight"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16-kahan"])
def test_exported_models_with_a_head_of_their_own(small, trained, tmp_path, llama, dtype):
    config = small({"model.path": str(llama), "objective.reward": "entropy", "momentum.dtype": dtype, "optim.lr": 1e-3})
    trainer, _ = trained(config, 2)
    exported = export(trainer, tmp_path)
    assert not torch.equal(exported["policy"]["lm_head.weight"], exported["policy"]["model.embed_tokens.weight"])
    for name, parameter in exported["momentum"].items():
        assert torch.equal(parameter.float(), trainer.momentum.weights[name].float()), name


def export(trainer, folder):
    """Saves a checkpoint and loads both models of it as anyone would."""
    folder = folder / "saved"
    folder.mkdir()
    trainer.save(folder)
    models = {}
    for source in ("policy", "momentum"):
        tokenizer = AutoTokenizer.from_pretrained(folder / source)
        assert tokenizer.decode(tokenizer.encode("12+34=46")) == "12+34=46"
        model = AutoModelForCausalLM.from_pretrained(folder / source)
        assert model.config.eos_token_id == tokenizer.eos_token_id == 1
        models[source] = dict(model.named_parameters())
    return models


def test_checkpoints_without_the_configuration_are_refused(resume, run_of_two, capsys):
    (run_of_two / "config.json").unlink()
    assert resume() == 2
    assert "config.json" in capsys.readouterr().err


def test_what_a_crash_left_of_a_checkpoint_is_swept(resume, run_of_two):
    left = run_of_two / "checkpoints" / ".step_9.tmp"
    left.mkdir()
    (left / "state.json").write_text("{")
    assert resume("--stop-after", "3") == 0
    assert not left.exists()


def test_the_state_of_an_earlier_release_is_restored(small, trained, tmp_path):
    """Its counters stood side by side; they belong to parts now."""
    trainer, _ = trained(small({}), 2)
    trainer.state.rollbacks, trainer.learner.nonfinite_steps = 1, 3
    trainer.save(tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    learner = state.pop("learner")
    state |= state.pop("train") | {"optimizer_step": learner.pop("step")} | learner
    (tmp_path / "state.json").write_text(json.dumps(state))
    again, _ = trained(small({}), 0)
    again.restore(tmp_path)
    assert (again.step, again.state.rollbacks) == (2, 1)
    assert again.learner.state_dict() == trainer.learner.state_dict()
    assert again.sampler.state_dict() == trainer.sampler.state_dict()
