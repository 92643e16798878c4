"""A run: its directory, and everything around the training loop: log, monitor, checkpoints, signals, report."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mgrpo import checkpoint
from mgrpo.config import Config, ConfigError, flag, from_dict, to_dict
from mgrpo.metrics import Metrics, StorageError, make_trackers, read_metrics
from mgrpo.monitor import Monitor
from mgrpo.plan import refuse_distributed, refuse_used_directory
from mgrpo.policy import pick_backend, pick_device
from mgrpo.progress import Progress
from mgrpo.report import write_report
from mgrpo.rollout import EngineError, StaleWeightsError
from mgrpo.trainer import Trainer

# Options that may differ when a run is resumed: they change what is watched and kept, not what is computed.
RESUMABLE = {"run_dir", "stop_after", "resume", "resume_extend", "dry_run", "checkpoint", "log", "monitor"}
RESUMABLE |= {f"rollout.{name}" for name in ("placement", "servers", "devices", "weights_host", "timeout_s", "sleep")}
RESUMABLE |= {f"rollout.{name}" for name in ("gpu_memory", "kv_cache_gib", "parity_every", "transfer")}
STORAGE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
}
KILLED = 130  # exit code of a second signal, which saves nothing


class Exit(IntEnum):
    """Exit codes of the command line."""

    DONE = 0
    ERROR = 1
    BAD_INPUT = 2
    COLLAPSE = 3
    NON_FINITE = 4
    ENGINE = 5
    STORAGE = 6
    INTERRUPTED = 75


def run(config: Config) -> Exit:
    """Trains from start, or from the newest checkpoint, to the last step; returns why it ended."""
    refuse_distributed()
    pick_backend(config.kernels.backend, pick_device(config.model.device))
    if config.threads:
        torch.set_num_threads(config.threads)
    run_dir = Path(config.run_dir or f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}")
    with storage_errors(), locked(run_dir, config):
        trainer = Trainer(config)
        try:
            return _train(trainer, run_dir)
        finally:
            trainer.close()


def _train(trainer: Trainer, run_dir: Path) -> Exit:
    """The loop and what surrounds it."""
    config = trainer.config
    rows = resume(trainer, run_dir) if config.resume else []
    write_aside(run_dir / "config.json", json.dumps(to_dict(config), indent=1))
    trackers = make_trackers(config, run_dir, trainer.step)
    monitor, interrupt = Monitor(config.monitor, num_prompts=config.rollout.prompts), Interrupt()
    for row in rows:
        monitor.observe(row)
    last_step = min(config.stop_after or config.steps, config.steps)
    outcome, saved, checkpoint_s = Exit.DONE, trainer.step, None
    with Progress(config, run_dir, trainer.step, last_step) as progress, interrupt.handled():
        for row in steps(trainer, last_step, run_dir):
            row["alarm"], row["time_checkpoint_s"] = monitor.observe(row) or None, checkpoint_s
            for tracker in trackers:
                tracker.log(row)
            rows.append(row)
            progress.show(row)
            write_samples(trainer, run_dir, progress)
            outcome = _outcome(trainer, row, interrupt.asked and trainer.step < last_step)
            checkpoint_s = None
            if outcome or trainer.step == last_step or _due(config.checkpoint.every, trainer.step):
                start = time.perf_counter()
                checkpoint.save_checkpoint(run_dir, trainer.step, trainer.save)
                saved, checkpoint_s = trainer.step, time.perf_counter() - start
                best = best_steps(rows, checkpoint.list_checkpoints(run_dir), monitor, config.checkpoint.keep_best)
                checkpoint.prune_checkpoints(run_dir, keep_last=config.checkpoint.keep_last, best=best)
            if outcome:
                break
        for tracker in trackers:
            tracker.close()
        report = write_report([run_dir]) if rows else None
        progress.end(outcome, saved, report)
    return outcome


def steps(trainer: Trainer, last_step: int, run_dir: Path) -> Iterator[Metrics]:
    """The steps; where the engine dies in one, a checkpoint of the step before, which nothing has touched."""
    whole = 0
    try:
        for row in trainer.train(last_step):
            whole = trainer.step
            yield row
    except StaleWeightsError:
        raise
    except EngineError as error:
        if not trainer.step == whole > 0:
            raise
        checkpoint.save_checkpoint(run_dir, trainer.step, trainer.save)
        raise EngineError(f"{error} Step {trainer.step} is saved: go on with --resume.") from error


def _outcome(trainer: Trainer, row: Metrics, interrupted: bool) -> Exit:
    """Whether the run has to end after this step."""
    if trainer.learner.nonfinite_in_row >= trainer.config.optim.max_nonfinite:
        return Exit.NON_FINITE
    if row["alarm"] and trainer.config.monitor.on_collapse == "stop":
        return Exit.COLLAPSE
    return Exit.INTERRUPTED if interrupted else Exit.DONE


def _due(every: int, step: int) -> bool:
    """Whether `step` is one of every so many."""
    return every > 0 and step % every == 0


class Interrupt:
    """SIGINT and SIGTERM ask for an end after the step; the second one ends at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Installs the handlers for a while, where Python allows it (the main thread)."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked:
                os._exit(KILLED)
            self.asked = True

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def locked(run_dir: Path, config: Config) -> Iterator[None]:
    """Makes the run directory and holds it; refuses one in use, and one with content unless the run is resumed."""
    refuse_used_directory(run_dir, config)
    is_new = not run_dir.exists()
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError([f"run: --run-dir must be free, another process trains in {run_dir}."]) from error
        try:
            yield
        finally:
            # A run that failed before it wrote anything leaves no directory behind.
            if is_new and [path.name for path in run_dir.iterdir()] == [".lock"]:
                shutil.rmtree(run_dir)


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turns a full disk, or one that may not be written, into StorageError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError) or error.errno not in STORAGE_ERRORS:
            raise
        raise StorageError(
            f"run: the disk must take what is written, got: {error}. Checkpoints are untouched."
        ) from error


def resume(trainer: Trainer, run_dir: Path) -> list[Metrics]:
    """Restores the newest valid checkpoint and cuts metrics.jsonl back to it; returns the rows before."""
    folder, complaints = checkpoint.newest_valid(run_dir)
    for complaint in complaints.values():
        print(f"resume: skipped {complaint}")
    if folder is None:
        if any(path.name != ".lock" for path in run_dir.iterdir()):
            raise checkpoint.CheckpointError(
                f"resume: {run_dir} must hold a valid checkpoint or nothing, got neither. Start in another directory."
            )
        print(f"resume: {run_dir} is empty, starting from step 0")
        return []
    if not (run_dir / "config.json").is_file():
        raise checkpoint.CheckpointError(
            f"resume: {run_dir} must hold the config.json that it was started with, got none. Put it back."
        )
    trainer.restore(folder)
    checkpoint.sweep(run_dir)
    for damaged in complaints:  # out of the way, so that it never takes the place of a sound one
        damaged.rename(damaged.with_name("damaged_" + damaged.name))
    rows = read_metrics(run_dir / "metrics.jsonl", up_to=trainer.step)
    write_aside(run_dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    print(f"resume: step {trainer.step} of {trainer.config.steps}, weights, optimiser and sampler from {folder}")
    return rows


def write_aside(path: Path, text: str) -> None:
    """Replaces a text file at once or not at all."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    aside.replace(path)


def resumed_config(run_dir: Path) -> Config | None:
    """The configuration that a run was started with; None where there is none."""
    path = run_dir / "config.json"
    if not path.is_file():
        return None
    try:
        return from_dict(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ConfigError([f"config: {path} must be JSON, got: {error}."]) from error


def check_resumable(config: Config, before: Config) -> None:
    """Raises ConfigError naming every option that would make the resumed run another run."""
    problems = []
    for name, old, new in differences(to_dict(before), to_dict(config)):
        if {name, name.split(".")[0]} & RESUMABLE or (name == "steps" and config.resume_extend):
            continue
        remedy = " Add --resume-extend to change it." if name == "steps" else ""
        problems.append(f"resume: {flag(name)} must be {old}, as the run was started, got {new}.{remedy}")
    if problems:
        raise ConfigError(problems)


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, old and new value of every leaf that differs."""
    for key, old in before.items():
        new = after[key]
        if isinstance(old, dict):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield prefix + key, old, new


def best_steps(rows: list[Metrics], folders: list[Path], monitor: Monitor, keep: int) -> list[int]:
    """Steps of the best checkpoints: by probe accuracy, or without a probe the newest from well before an alarm."""
    steps = [checkpoint.step_of(folder) for folder in folders]
    probe = {row["step"]: row["probe_accuracy_policy"] for row in rows if row.get("probe_accuracy_policy") is not None}
    if probe:
        judged = [step for step in steps if step in probe]
        return sorted(judged, key=lambda step: (probe[step], step))[-keep:] if keep else []
    sound = monitor.good_before()
    return [step for step in steps if sound is not None and step <= sound][-keep:] if keep else []


def write_samples(trainer: Trainer, run_dir: Path, progress: Progress) -> None:
    """Writes and shows the sampled rollouts of this step, where there are any."""
    if not trainer.samples or trainer.samples[0]["step"] != trainer.step:
        return
    import pyarrow
    import pyarrow.parquet

    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(trainer.samples), folder / f"step_{trainer.step}.parquet")
    progress.show_samples(trainer.samples)
