"""What stands in the way of a run, found before its first step."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mgrpo.config import Config, ConfigError
from mgrpo.grading.extract import make_extractor
from mgrpo.grading.labels import make_label_reader
from mgrpo.policy import load_tokenizer, pick_backend, pick_device
from mgrpo.prompts import load_prompts, require_answers
from mgrpo.records import InputError
from mgrpo.rollout.stop import make_stop


def find_problems(config: Config) -> list[str]:
    """Tries everything that a run reads at its start, short of the weights, and lists all that fails."""
    problems: list[str] = []

    def attempt(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except (ConfigError, InputError, ValueError) as error:
            problems.extend(str(error).split("\n"))
            return None

    attempt(refuse_distributed)
    if config.run_dir:
        attempt(lambda: refuse_used_directory(Path(config.run_dir or ""), config))
    attempt(lambda: make_extractor(config.answer.extract))
    attempt(lambda: make_label_reader(config.answer.label_extract))
    device = attempt(lambda: pick_device(config.model.device))
    if device:
        attempt(lambda: pick_backend(config.kernels.backend, device))
    needs_vllm = config.rollout.engine == "vllm" and config.rollout.placement != "server"
    if needs_vllm and find_spec("vllm") is None:
        problems.append("config: --rollout.engine vllm needs the package vllm, it is not installed. pip install vllm.")
    tokenizer = attempt(lambda: load_tokenizer(config.model))
    if tokenizer:
        attempt(lambda: make_stop(config.rollout.stop, config.data.template, tokenizer.tokenizer))
        data = attempt(lambda: load_prompts(config, tokenizer, config.data.train))
        if data and config.objective.reward == "labels":
            attempt(lambda: require_answers(data, "--objective.reward labels"))
        if data and len(data) < config.rollout.prompts:
            problems.append(
                f"data: --rollout.prompts must be at most the {len(data)} prompts of the data, "
                f"got {config.rollout.prompts}."
            )
        if config.data.probe:
            probe = attempt(lambda: load_prompts(config, tokenizer, str(config.data.probe)))
            if probe:
                attempt(lambda: require_answers(probe, "--data.probe"))
    return list(dict.fromkeys(problems))


def refuse_distributed() -> None:
    """Raises ConfigError where a launcher started several processes."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise ConfigError([f"run: WORLD_SIZE must be 1, got {world_size}. A run is one process, without torchrun."])


def refuse_used_directory(run_dir: Path, config: Config) -> None:
    """Raises ConfigError for a run directory with content, unless the run is resumed."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError([f"run: --run-dir must be a directory, {run_dir} is a file."])
    content = [path.name for path in run_dir.iterdir() if path.name != ".lock"] if run_dir.is_dir() else []
    if content and not config.resume:
        raise ConfigError([f"run: --run-dir must be empty, {run_dir} holds {content[0]}. Continue it with --resume."])
