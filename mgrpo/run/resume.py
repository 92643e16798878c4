"""Resumes a run: checks its options and restores its state."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mgrpo.config import Config, flag, from_dict, to_dict
from mgrpo.config.option import resumable_names
from mgrpo.config.renamed import upgrade
from mgrpo.errors import ConfigError
from mgrpo.observe.trackers import read_metrics, to_json
from mgrpo.process.disk import write_aside
from mgrpo.run import checkpoint
from mgrpo.run.directory import content_of
from mgrpo.training.trainer import Trainer
from mgrpo.types import Metrics

# Options that change monitoring and storage, not the computation.
RESUMABLE = set(resumable_names(Config))


def resume(trainer: Trainer, run_dir: Path) -> list[Metrics]:
    """Restores the newest valid checkpoint and truncates metrics.jsonl to it; returns the rows up to it.

    With several processes rank 0 chooses the checkpoint for all, and the others return no rows.
    """
    world = trainer.world
    folder, complaints = None, {}
    if world.is_first:
        checkpoint.sweep(run_dir)
        folder, complaints = checkpoint.newest_valid(run_dir)
        for complaint in complaints.values():
            print(f"resume: skipped {complaint}")
        _require_start(run_dir, folder)
    if (chosen := world.broadcast(folder and str(folder))) is None:
        return []
    trainer.restore(Path(chosen))
    if not world.is_first:
        return []
    for damaged in complaints:  # renamed, so that it never counts as a valid one
        aside = damaged.with_name("damaged_" + damaged.name)
        shutil.rmtree(aside, ignore_errors=True)  # from an earlier resume
        damaged.rename(aside)
    rows = read_metrics(run_dir / "metrics.jsonl", up_to=trainer.step)
    write_aside(run_dir / "metrics.jsonl", "".join(to_json(row) + "\n" for row in rows))
    threads, before = torch.get_num_threads(), trainer.checkpointer.threads
    if before not in (None, threads):
        print(
            f"resume: {threads} CPU threads, {before} before: the next steps differ in their last bits. "
            f"OMP_NUM_THREADS={before} repeats them."
        )
    print(f"resume: step {trainer.step} of {trainer.config.steps}, weights, optimiser and sampler from {folder}")
    return rows


def _require_start(run_dir: Path, folder: Path | None) -> None:
    """Raises CheckpointError if the directory holds neither a checkpoint with its configuration nor a new run."""
    if folder is None:
        # A run that ended before its first checkpoint has its configuration and maybe some rows.
        was_started = (run_dir / "config.json").is_file() and not any((run_dir / "checkpoints").glob("*step_*"))
        if not was_started and content_of(run_dir):
            raise checkpoint.CheckpointError(
                f"resume: {run_dir} must hold a valid checkpoint or nothing, got neither. Start in another directory."
            )
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        print(f"resume: {run_dir} holds no checkpoint, starting from step 0")
    elif not (run_dir / "config.json").is_file():
        raise checkpoint.CheckpointError(
            f"resume: {run_dir} must hold the config.json that it was started with, got none. Put it back."
        )


def resumed_config(run_dir: Path) -> Config | None:
    """The configuration that a run was started with, None if the directory has none."""
    path = run_dir / "config.json"
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text())
        return from_dict(upgrade(data))
    except json.JSONDecodeError as error:
        raise ConfigError([f"config: {path} must be JSON, got: {error}."]) from error


def check_resumable(config: Config, before: Config) -> None:
    """Raises ConfigError that names every changed option that a resumed run may not change."""
    if problems := resume_problems(config, before):
        raise ConfigError(problems)


def resume_problems(config: Config, before: Config) -> list[str]:
    """A message for each changed option that a resumed run may not change."""
    problems = []
    for name, old, new in differences(to_dict(before), to_dict(config)):
        if {name, name.split(".")[0]} & RESUMABLE or (name == "steps" and config.resume_extend):
            continue
        remedy = " Add --resume-extend to change it." if name == "steps" else ""
        problems.append(f"resume: {flag(name)} must be {old}, as the run was started, got {new}.{remedy}")
    return problems


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, old and new value of every leaf that differs."""
    for key, old in before.items():
        new = after[key]
        if isinstance(old, dict):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield prefix + key, old, new
