"""A small fast run on the shipped model, and ways to start and to read one; conftest.py names the fixtures it takes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mgrpo.config import Config, flag
from mgrpo.models.files import quiet_transformers
from mgrpo.presets import make_preset
from mgrpo.tasks.arithmetic import make_tokenizer
from mgrpo.train import main
from mgrpo.training.trainer import Trainer

quiet_transformers()

# A step of this takes well under 0.2 s.
SMALL: dict[str, Any] = {
    "steps": 3,
    "data.train": "arithmetic:24:2-3:0",
    "data.probe": None,
    "rollout.num_prompts": 4,
    "rollout.num_policy": 4,
    "rollout.num_momentum": 2,
    "rollout.max_new_tokens": 24,
    "checkpoint.every": 0,
    "eval.every": 0,
    "log.backends": (),
    "log.kl_initial_every": 0,
    "monitor.retention_every": 0,
}


def change(config: Config, changes: dict[str, Any]) -> Config:
    """Replaces fields by dotted name, all of them before anything is checked."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        group, _, key = name.rpartition(".")
        groups.setdefault(group, {})[key] = value
    values = {g: dataclasses.replace(getattr(config, g), **fields) for g, fields in groups.items() if g}
    return dataclasses.replace(config, **values, **groups.get("", {}))


def small_config(changes: dict[str, Any] | None = None, preset: str = "mgrpo_arithmetic") -> Config:
    """A preset cut down to the small run; presets without momentum rollouts keep none."""
    config, cuts = make_preset(preset), dict(SMALL)
    if config.rollout.num_momentum == 0:
        cuts["rollout.num_momentum"] = 0
    if config.vote.num_train:
        cuts["vote.num_train"] = 2
    return change(config, cuts | (changes or {}))


def make_flags(run_dir: Path, changes: dict[str, Any], preset: str = "mgrpo_arithmetic") -> list[str]:
    """The small run as a command line of `mgrpo.train`."""
    flags = [preset, "--run-dir", str(run_dir)]
    for name, value in (SMALL | changes).items():
        flags += [flag(name), *([] if isinstance(value, tuple) else [str(value)])]
    return flags


def deterministic(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics without its clock readings."""
    return {key: v for key, v in row.items() if not key.startswith("time_") and key not in ("step_s", "tokens_per_s")}


@pytest.fixture
def small() -> Callable[..., Config]:
    """Makes a small configuration: `small({"optim.lr": 1e-3}, preset="srt")`."""
    return small_config


@pytest.fixture
def altered() -> Callable[[Config, dict[str, Any]], Config]:
    """Replaces fields of a configuration by dotted name."""
    return change


@pytest.fixture
def command_line() -> Callable[[Path, dict[str, Any]], list[str]]:
    """Writes the flags of a small run."""
    return make_flags


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs the command line in this process, without the report, and returns the exit code."""
    monkeypatch.setattr("mgrpo.run.loop._write_report", lambda run_dir: run_dir / "report.html")

    def start(changes: dict[str, Any] | None = None, *extra: str, run_dir: Path | None = None) -> int:
        return call([*make_flags(run_dir or tmp_path / "run", changes or {}), *extra])

    return start


@pytest.fixture
def resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Resumes a run in this process with nothing but the flags given, and returns the exit code."""
    monkeypatch.setattr("mgrpo.run.loop._write_report", lambda run_dir: run_dir / "report.html")

    def start(*extra: str, run_dir: Path | None = None) -> int:
        return call(["--run-dir", str(run_dir or tmp_path / "run"), "--resume", *extra])

    return start


def call(arguments: list[str]) -> int:
    """Exit code of `mgrpo.train`, which leaves by SystemExit where the flags cannot be parsed."""
    try:
        return int(main(arguments))
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def rows_of() -> Callable[..., list[dict[str, Any]]]:
    """Reads metrics.jsonl of a run directory, without its clock readings unless `clocks` is set."""

    def read(run_dir: Path, *, clocks: bool = False) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return rows if clocks else [deterministic(row) for row in rows]

    return read


@pytest.fixture
def trained() -> Iterator[Callable[..., tuple[Trainer, list[dict[str, Any]]]]]:
    """Trains a configuration for a number of steps; returns the trainer and its rows without clock readings."""
    trainers = []

    def train(config: Config, steps: int, **options: Any) -> tuple[Trainer, list[dict[str, Any]]]:
        trainer = Trainer(config, **options)
        trainers.append(trainer)
        return trainer, [deterministic(row) for row in trainer.train(steps)]

    yield train
    for trainer in trainers:
        trainer.close()


@pytest.fixture
def weights_of() -> Callable[[Trainer], dict[str, torch.Tensor]]:
    """Copies the weights of policy and momentum."""

    def read(trainer: Trainer) -> dict[str, torch.Tensor]:
        policy = {f"policy/{name}": p.detach().clone() for name, p in trainer.model.named_parameters()}
        return policy | {f"momentum/{name}": w.clone() for name, w in trainer.momentum.weights.items()}

    return read


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with grouped heads and a head of its own, and the tokenizer of the built-in task."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "llama", make_tokenizer()
    save_llama(folder, tokenizer, seed=0)
    return folder


def save_llama(folder: Path, tokenizer: Any, seed: int) -> None:
    """Saves a random Llama with an untied head and its tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                tie_word_embeddings=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
                initializer_range=0.1,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., None]:
    """Saves a random Llama with another tokenizer."""
    return save_llama
