from __future__ import annotations

import ast
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mgrpo
from mgrpo.errors import ConfigError, EngineError
from mgrpo.models.tokenizer import resolve_path
from mgrpo.observe.trackers import JsonlTracker
from mgrpo.process.disk import list_checkpoints, step_of
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.run.checkpoint import verify_checkpoint
from mgrpo.train import main
from mgrpo.training.grader import Grader
from mgrpo.training.trainer import Trainer
from mgrpo.types import WeightTag

TRAIN = '{"prompt": "12+34=", "answer": "46"}\n'


def said(capsys):
    """Everything printed so far, on one line."""
    out, err = capsys.readouterr()
    return " ".join((out + err).replace("│", " ").split())


def steps_saved(run_dir):
    return [step_of(folder) for folder in list_checkpoints(run_dir)]


def copy_base(folder):
    shutil.copytree(resolve_path("builtin:arithmetic"), folder)
    return folder


# name: (files to write, flags, what the message must say)
BAD = {
    "unknown flag": ({}, ["--optim.lrr", "1"], "config: --optim.lrr is not a known option. Did you mean --optim.lr?"),
    "underscores": ({}, ["--rollout.top_pp", "1"], "--rollout.top-p"),
    "not a number": ({}, ["--optim.lr", "fast"], "config: --optim.lr must be a number, got fast."),
    "not a choice": ({}, ["--vote.pool", "all"], "config: --vote.pool must be both, policy or momentum, got all."),
    "missing file": (
        {"train.jsonl": TRAIN},
        ["--data.train", "{dir}/trian.jsonl"],
        "{dir}/trian.jsonl: no such file or folder. Did you mean {dir}/train.jsonl?",
    ),
    "missing probe": ({}, ["--data.probe", "{dir}/probe.csv"], "{dir}/probe.csv: no such file or folder."),
    "malformed line": (
        {"train.jsonl": TRAIN * 2 + "{broken\n"},
        ["--data.train", "{dir}/train.jsonl"],
        "{dir}/train.jsonl:3: not valid JSON",
    ),
    "no records": ({"train.jsonl": "\n"}, ["--data.train", "{dir}/train.jsonl"], "at least one record, got none"),
    "empty folder": ({}, ["--data.train", "{dir}"], "folder must hold .jsonl"),
    "no prompt": (
        {"train.jsonl": '{"promt": "1+1="}\n'},
        ["--data.train", "{dir}/train.jsonl"],
        "{dir}/train.jsonl:1: record must have the key 'prompt', got promt. Did you mean 'promt'?",
    ),
    "few prompts": (
        {"train.jsonl": TRAIN * 3},
        ["--data.train", "{dir}/train.jsonl"],
        "--rollout.num-prompts must be at most the 3 prompts of the data, got 4. Set another",
    ),
    "probe without answers": (
        {"probe.jsonl": TRAIN + '{"prompt": "1+1="}\n'},
        ["--data.probe", "{dir}/probe.jsonl"],
        "--data.probe needs the true answer of every prompt, 1 of 2 have none",
    ),
    "labels without answers": (
        {"train.jsonl": TRAIN + '{"prompt": "1+1="}\n' * 3},
        ["--data.train", "{dir}/train.jsonl", "--objective.reward", "labels"],
        "--objective.reward labels needs the true answer of every prompt, 3 of 4 have none",
    ),
    "overlong": ({"train.jsonl": TRAIN * 4}, ["--data.train", "{dir}/train.jsonl", "--rollout.max-new-tokens", "252"],
                 "prompts must have at most 4 tokens, got 4 of 4 longer ones, the first train.jsonl:1 with 6."),
    "no room": ({}, ["--rollout.max-new-tokens", "256"], "--rollout.max-new-tokens must be below the model's context"),
    "temperature 0": ({}, ["--rollout.temperature", "0"], "--rollout.temperature must be in (0, inf), got 0.0."),
    "M 0": ({}, ["--rollout.num-policy", "0"], "--rollout.num-policy must be in [1, inf), got 0."),
    "M 1": ({}, ["--rollout.num-policy", "1"], "a prompt needs 2 rollouts to compare, got 1."),
    "N 0 in the pool": (
        {},
        ["--rollout.num-momentum", "0", "--vote.pool", "momentum"],
        "--vote.pool momentum needs --rollout.num-momentum of at least 1, got 0.",
    ),
    "two problems": ({}, ["--steps", "0", "--optim.lr", "-1"], "--optim.lr must be in [0, inf), got -1.0"),
    "bad extract": ({}, ["--answer.extract", "boxd"], "must be boxed, hash, last-number or regex:PATTERN, got 'boxd'"),
    "bad pattern": ({}, ["--answer.extract", "regex:(("], "valid pattern"),
    "bad template": ({}, ["--data.template", "Q:"], "template must hold {{prompt}} exactly once"),
    "no chat template": ({}, ["--data.template", "chat"], "tokenizer must have a chat template, got none"),
    "no model": ({}, ["--model.path", "{dir}/none"], "must be a model folder or a hub id, {dir}/none does not"),
    "no builtin": ({}, ["--model.path", "builtin:none"], "must be one of ['builtin:arithmetic', 'builtin:arith"),
    "no device": ({}, ["--model.device", "gpu"], "--model.device must be auto, cpu or cuda[:N], got gpu."),
    "resume without directory": ({}, ["--resume", "--run-dir", "None"], "--resume needs --run-dir"),
    "resume without checkpoint": (
        {"run/metrics.jsonl": ""},
        ["--resume"],
        "{dir}/run must hold a valid checkpoint or nothing, got neither.",
    ),
    "content": ({"run/x": ""}, [], "--run-dir must be empty, {dir}/run holds x. Continue it with --resume."),
    "a file": ({"run": ""}, [], "{dir}/run"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_with_2_and_says_why(launch, tmp_path, capsys, case):
    files, flags, message = BAD[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert launch({}, *(f.replace("{dir}", str(tmp_path)) for f in flags)) == 2
    assert " ".join(message.format(dir=tmp_path).split()) in said(capsys)
    # What was there is still there, and nothing else.
    assert (tmp_path / "run").exists() == any(name.startswith("run") for name in files)
    assert not list(tmp_path.glob("run/checkpoints")) and not list(tmp_path.glob("run/config.json"))


def test_unknown_preset_offers_the_nearest(capsys):
    assert main(["aritmetic", "--steps", "1"]) == 2
    assert "got aritmetic. Did you mean arithmetic?" in said(capsys)


def test_weights_with_nan_are_refused(launch, tmp_path, capsys):
    folder = copy_base(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert launch({"model.path": folder}) == 2
    assert f"model: model.norm.weight of {folder} must be finite, got NaN or infinity." in said(capsys)


def test_truncated_weights_are_refused(launch, tmp_path, capsys):
    folder = copy_base(tmp_path / "model")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert launch({"model.path": folder}) == 2
    assert f"model: {folder} must be a model folder" in said(capsys)


def test_tokenizer_without_eos_is_refused(launch, tmp_path, capsys):
    folder = copy_base(tmp_path / "model")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({k: v for k, v in content.items() if not k.startswith("eos_token")}))
    assert launch({"model.path": folder}) == 2
    assert f"the tokenizer of {folder} must have an EOS token, got none." in said(capsys)


def test_a_world_without_its_launcher_is_refused(launch, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch() == 2
    assert "WORLD_SIZE is 2, so RANK, MASTER_ADDR, MASTER_PORT must be set too." in said(capsys)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE must be an integer above 0, got x."),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE must be an integer above 0, got -2."),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE must be an integer above 0, got 0."),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK must be below WORLD_SIZE (2), got 2."),
        ({"RANK": "1"}, "RANK must be below WORLD_SIZE (1), got 1."),
        ({"WORLD_SIZE": "2", "RANK": "first"}, "RANK must be an integer of 0 or more, got first."),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK must be below LOCAL_WORLD_SIZE (2), got 3."),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE must be an integer above 0, got 0."),
    ],
)
def test_an_environment_that_gives_no_place_is_refused(launch, monkeypatch, capsys, tmp_path, place, message):
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    for dry in ([], ["--dry-run"]):
        assert launch({}, *dry) == 2
        assert said(capsys) == f"run: {message} Unset it in the environment, or start with torchrun."
    assert not (tmp_path / "run").exists()


def test_an_environment_with_a_place_is_accepted(launch, monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": ""}.items():
        monkeypatch.setenv(name, value)
    assert launch({}, "--dry-run") == 0


def test_a_run_directory_in_use_is_refused(launch, resume, tmp_path, rows_of, monkeypatch, capsys):
    judge, codes = Grader.assign_credit, []

    def meanwhile(self, batch, logprobs):
        if batch.step == 2:
            codes.append(resume())
        return judge(self, batch, logprobs)

    monkeypatch.setattr(Grader, "assign_credit", meanwhile)
    assert launch() == 0 and codes == [2]
    assert f"--run-dir must be free, another process trains in {tmp_path}/run." in said(capsys)
    assert len(rows_of(tmp_path / "run")) == 3
    assert resume() == 0


def test_default_run_directory(launch, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert launch({"steps": 1, "run_dir": None}) == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("mgrpo_arithmetic-20") and steps_saved(run_dir) == [1]


def test_collapse_stops_with_3_and_keeps_a_checkpoint(launch, tmp_path, rows_of, capsys):
    alarms = {"steps": 30, "monitor.window": 1, "monitor.length_change": 1.001, "monitor.agreement_drop": 1}
    assert launch(alarms | {"monitor.on_collapse": "stop"}) == 3
    rows = rows_of(tmp_path / "run")
    assert 1 < len(rows) < 30 and [row["alarm"] for row in rows[:-1]] == [None] * (len(rows) - 1)
    before, after = rows[0]["response_length"], rows[-1]["response_length"]
    assert rows[-1]["alarm"] == [f"responses went from {before:.0f} to {after:.0f} tokens"]
    assert steps_saved(tmp_path / "run") == [len(rows)]
    text = said(capsys)
    assert f"collapse alarm at step {len(rows)}: {rows[-1]['alarm'][0]}" in text
    assert "stopped by the collapse monitor" in text


def test_collapse_only_warns_by_default(launch, tmp_path, rows_of, capsys):
    assert launch({"steps": 8, "monitor.window": 1, "monitor.length_change": 1.001}) == 0
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 8 and any(row["alarm"] for row in rows[:-1])
    assert "collapse alarm at step" in said(capsys)


def test_nonfinite_losses_stop_with_4_and_touch_no_weight(launch, tmp_path, rows_of, monkeypatch, capsys):
    from mgrpo.algorithm.loss import micro_batch_loss

    def spoiled(*args, **options):
        result = micro_batch_loss(*args, **options)
        return result._replace(loss=result.loss * torch.nan)

    monkeypatch.setattr("mgrpo.training.learner.micro_batch_loss", spoiled)
    # The entropy bonus puts a loss into every step, also where all rewards of a group are equal.
    assert launch({"steps": 9, "optim.max_nonfinite": 3, "momentum.decay": 0.5, "objective.entropy_coef": 0.01}) == 4
    rows = rows_of(tmp_path / "run")
    assert [row["nonfinite_steps"] for row in rows] == [1, 2, 3] and [row["loss"] for row in rows] == [None] * 3
    folder = tmp_path / "run" / "checkpoints" / "step_3"
    assert verify_checkpoint(folder) == 3
    base = load_file(Path(resolve_path("builtin:arithmetic")) / "model.safetensors")
    for source in ("policy", "momentum"):
        saved = load_file(folder / source / "model.safetensors")
        assert saved.keys() == base.keys() and all(torch.equal(saved[name], base[name]) for name in base), source
    assert "too many non-finite steps in a row" in said(capsys)


def test_a_finite_step_ends_the_row_of_nonfinite_ones(launch, tmp_path, rows_of, monkeypatch):
    from mgrpo.algorithm.loss import micro_batch_loss

    calls = []

    def spoiled(*args, **options):
        result = micro_batch_loss(*args, **options)
        calls.append(None)
        return result._replace(loss=result.loss * torch.inf) if len(calls) % 3 else result

    monkeypatch.setattr("mgrpo.training.learner.micro_batch_loss", spoiled)
    assert launch({"steps": 7, "optim.max_nonfinite": 3, "objective.entropy_coef": 0.01}) == 0
    assert [row["nonfinite_steps"] for row in rows_of(tmp_path / "run")] == [1, 2, 2, 3, 4, 4, 5]


def test_absurd_learning_rate_ends_with_4(launch, tmp_path):
    assert launch({"steps": 12, "optim.lr": 1e30}) == 4
    (folder,) = list_checkpoints(tmp_path / "run")
    assert verify_checkpoint(folder) == step_of(folder) < 12


def test_dead_engine_exits_with_5(launch, monkeypatch, capsys):
    def die(*args, **options):
        raise EngineError("generate: the engine must answer, got nothing.")

    monkeypatch.setattr(TransformersEngine, "generate", die)
    assert launch() == 5
    assert "the engine must answer" in said(capsys)


def test_stale_weights_exit_with_5(launch, monkeypatch, capsys):
    update = TransformersEngine.update_weights

    def forget(engine, weights, tag):
        update(engine, weights, WeightTag(tag.source, 0))

    monkeypatch.setattr(TransformersEngine, "update_weights", forget)
    assert launch() == 5
    assert "weights must be momentum version 1, got ('momentum', 0)" in said(capsys)


@pytest.mark.fault("disk full under the metrics")
def test_full_disk_under_metrics_exits_with_6(launch, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(JsonlTracker, "__init__", lambda self, path: setattr(self, "file", Full()))
    assert launch() == 6
    assert "No space left on device" in said(capsys)
    assert steps_saved(tmp_path / "run") == []


class Full:
    """A file on a device without room."""

    def __init__(self):
        self.file = open("/dev/full", "wb", buffering=0)

    def write(self, text):
        self.file.write(text.encode())

    def close(self):
        self.file.close()


def test_full_disk_under_a_checkpoint_keeps_the_earlier_ones(launch, resume, monkeypatch, tmp_path, capsys):
    snapshot = Trainer.snapshot

    def fill(trainer):
        save, step = snapshot(trainer), trainer.step

        def write(folder):
            save(folder)
            if step == 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

        return write

    monkeypatch.setattr(Trainer, "snapshot", fill)
    assert launch({"steps": 6, "checkpoint.every": 2}) == 6
    assert "step_4 could not be written" in said(capsys)
    folder = tmp_path / "run" / "checkpoints" / "step_2"
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == [folder] and verify_checkpoint(folder) == 2
    monkeypatch.setattr(Trainer, "snapshot", snapshot)
    assert resume() == 0
    assert steps_saved(tmp_path / "run") == [4, 6]


def test_unexpected_errors_are_not_hidden(launch, monkeypatch):
    monkeypatch.setattr(Grader, "assign_credit", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        launch()
    assert not hasattr(caught.value, "__notes__")  # there is no checkpoint yet


@pytest.mark.parametrize(
    ("error", "code"),
    [(EngineError("gone."), 5), (OSError(28, "full"), 6), (KeyError("x"), None), (ConfigError([]), 2)],
)
def test_the_last_line_says_how_to_go_on_where_a_resume_may_cure(launch, tmp_path, monkeypatch, capsys, error, code):
    credit, last = Grader.assign_credit, f"continue with --resume --run-dir {tmp_path}/run"

    def fail(grader, batch, logprobs):
        if batch.step == 3:
            raise error
        return credit(grader, batch, logprobs)

    monkeypatch.setattr(Grader, "assign_credit", fail)
    if code is None:
        with pytest.raises(KeyError) as caught:
            launch({"checkpoint.every": 1})
        assert caught.value.__notes__ == [last]
    else:
        assert launch({"checkpoint.every": 1}) == code
        assert (capsys.readouterr().err.splitlines()[-1:] == [last]) == (code != 2)
    assert steps_saved(tmp_path / "run")


@pytest.mark.fault("SIGINT")
def test_sigint_ends_after_the_step(launch, tmp_path, rows_of, monkeypatch):
    judge = Grader.assign_credit

    def interrupted(self, batch, logprobs):
        if batch.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return judge(self, batch, logprobs)

    monkeypatch.setattr(Grader, "assign_credit", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert launch({"steps": 5}) == 75
    assert len(rows_of(tmp_path / "run")) == 2 and steps_saved(tmp_path / "run") == [2]
    assert signal.getsignal(signal.SIGINT) is before


def test_sigint_on_the_last_step_is_no_interruption(launch, monkeypatch):
    judge = Grader.assign_credit

    def interrupted(self, batch, logprobs):
        if batch.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return judge(self, batch, logprobs)

    monkeypatch.setattr(Grader, "assign_credit", interrupted)
    assert launch({"steps": 2}) == 0


@pytest.mark.fault("second signal")
def test_a_second_signal_ends_at_once_and_saves_nothing(launch, tmp_path, monkeypatch):
    """The exit itself is replaced by an exception, which leaves the step where the process would have ended."""

    class Ended(Exception):
        pass

    def end(code):
        raise Ended(code)

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(Grader, "assign_credit", interrupted)
    with pytest.raises(Ended, match=r"^130$"):
        launch({"steps": 5})
    assert steps_saved(tmp_path / "run") == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_directory_that_may_not_be_written_exits_with_6(launch, monkeypatch, capsys, code):
    def refuse(self, metrics):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(JsonlTracker, "log", refuse)
    assert launch() == 6
    assert os.strerror(code) in said(capsys)


@pytest.mark.slow
@pytest.mark.fault("SIGTERM to a process")
def test_sigterm_saves_and_resume_goes_on(command_line, resume, tmp_path, rows_of):
    run_dir = tmp_path / "run"
    flags = command_line(run_dir, {"steps": 100000})
    environment = os.environ | {"PYTHONPATH": str(Path(mgrpo.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-m", "mgrpo.train", *flags], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 120
        while not (run_dir / "metrics.jsonl").exists() or len(rows_of(run_dir)) < 2:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75 and "interrupted; continue with --resume" in output
    saved = len(rows_of(run_dir))
    assert steps_saved(run_dir) == [saved] and saved < 100000
    assert resume("--stop-after", str(saved + 2)) == 0
    assert [row["step"] for row in rows_of(run_dir)] == list(range(1, saved + 3))


def test_dry_run_prints_the_plan_and_writes_nothing(launch, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert launch({"steps": 3}, "--dry-run") == 0
    assert list(tmp_path.iterdir()) == []
    text = said(capsys)
    for part in (
        "24 (0 overlong dropped), longest 9 tokens",
        "4 prompts x (4 policy + 2 momentum) = 24",
        "in the loss 16 at most",
        "response tokens a step 576 at most",
        "3 = 0.50 epochs",
        "parameters 223,392",
        "AdamW moments (fp32) 1.7 MiB",
        "momentum model (fp32) 0.9 MiB",
        "logits and their gradient",
        "KV cache of 16 x 33 tokens 0.8 MiB",
    ):
        assert part in text


def test_dry_run_lists_the_backend_of_every_op_in_use(launch, capsys):
    called = set()
    for path in Path(mgrpo.__file__).parent.rglob("*.py"):
        if path.name == "doctor.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            is_op = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_op and isinstance(node.func.value, ast.Name) and node.func.value.id == "K":
                called.add(node.func.attr)
    assert len(called) > 5
    for forced, found in (("auto", "cpu"), ("reference", "reference"), ("cpu", "cpu")):
        assert launch({}, "--dry-run", "--kernels.backend", forced) == 0
        text = said(capsys)
        assert all(f" {op} {found}" in text for op in called), forced


def test_a_backend_that_is_not_there_is_refused_before_anything_starts(launch, capsys, monkeypatch):
    monkeypatch.setenv("MGRPO_BACKEND", "turbo")
    for dry in ([], ["--dry-run"]):
        assert launch({}, *dry) == 2
        refusal = said(capsys)
        assert "config: MGRPO_BACKEND must be one of ['auto', 'reference', 'cpu'" in refusal and "'turbo'" in refusal


def test_a_run_says_which_kernels_it_takes(launch, capsys):
    assert launch({}, "--steps", "1") == 0
    assert "kernels: cpu, compiled, instruction set" in said(capsys)


def test_dry_run_counts_what_options_add(launch, capsys):
    options = {
        "objective.momentum_in_loss": True,
        "vote.num_train": 3,
        "model.dtype": "bf16",
        "momentum.dtype": "bf16-kahan",
        "log.kl_initial_every": 5,
    }
    options["optim.num_epochs"] = 4
    flags = {name: value for name, value in options.items() if value is not True}
    assert launch(flags, "--objective.momentum-in-loss", "--dry-run") == 0
    text = said(capsys)
    for part in (
        "in the loss 20 at most",
        "optimiser steps 12",
        "engine: weights (bf16) 0.4 MiB",
        "initial weights (bf16) 0.4 MiB",
        "KV cache of 16 x 33 tokens 0.4 MiB",
    ):
        assert part in text
    # Kahan compensation is a second bf16 number a weight.
    assert "momentum model (bf16-kahan) 0.9 MiB" in text


def test_dry_run_lists_every_problem(launch, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text(TRAIN)
    problems = {
        "data.train": tmp_path / "train.jsonl",
        "data.probe": tmp_path / "none.csv",
        "answer.extract": "boxd",
        "model.device": "gpu",
    }
    assert launch(problems, "--dry-run") == 2
    text = said(capsys)
    for part in (
        "--rollout.num-prompts must be at most the 1 prompts",
        f"{tmp_path}/none.csv: no such file",
        "got 'boxd'",
        "got gpu",
    ):
        assert text.count(part) == 1
    assert not (tmp_path / "run").exists()


def test_dry_run_lists_problems_of_options_model_and_data_together(launch, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text(TRAIN)
    problems = {
        "steps": 0,
        "vote.num_train": 100,
        "data.train": tmp_path / "train.jsonl",
        "data.probe": tmp_path / "none.csv",
        "model.path": tmp_path / "none",
    }
    flags = ["--optim.lrr", "1", "--data.overlong", "cut", "--dry-run"]
    assert launch(problems, *flags) == 2
    expected = [
        "config: --steps must be in [1, inf), got 0.",
        "config: --optim.lrr is not a known option. Did you mean --optim.lr?",
        "config: --data.overlong must be error or drop, got cut.",
        "config: --vote.num-train must be at most --rollout.num-policy (4), got 100.",
        f"model: --model.path must be a model folder or a hub id, {tmp_path}/none does not exist.",
        "data: --rollout.num-prompts must be at most the 1 prompts of the data, got 4. Set another "
        "--rollout.num-prompts or add data.",
        f"{tmp_path}/none.csv: no such file or folder. Check the path.",
    ]
    assert capsys.readouterr().err.splitlines() == expected
    # Data that cannot be fitted to the model is still read.
    few = {"data.train": tmp_path / "train.jsonl", "rollout.max_new_tokens": 1000}
    assert launch(few, "--dry-run") == 2
    assert [line.partition(" must")[0] for line in capsys.readouterr().err.splitlines()] == [
        "data: --rollout.max-new-tokens",
        "data: --rollout.num-prompts",
    ]
    # What is judged in place of a wrong value is not reported.
    assert launch(problems | {"rollout.num_prompts": "x"}, *flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "--rollout.num-prompts" in line] == [
        "config: --rollout.num-prompts must be an integer, got x."
    ]


def test_dry_run_refuses_what_the_run_would(launch, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x").touch()
    assert launch({}, "--dry-run") == 2
    assert "--run-dir must be empty" in said(capsys)
