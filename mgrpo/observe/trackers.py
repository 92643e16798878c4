"""Writes the metrics of a step to metrics.jsonl, TensorBoard and other trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from mgrpo.config import Config, to_dict
from mgrpo.errors import ConfigError, InputError
from mgrpo.process.disk import write_aside
from mgrpo.types import Metrics


def to_json(metrics: Metrics) -> str:
    """Metrics as one line of JSON; NaN and infinity become null."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()})


class JsonlTracker:
    """metrics.jsonl: one JSON object a step, flushed as it is written; NaN and infinity become null."""

    def __init__(self, path: Path):
        self.path, self.file = path, path.open("a")

    def log(self, metrics: Metrics) -> None:
        """Appends one line."""
        self.file.write(to_json(metrics) + "\n")
        self.file.flush()

    def rewind(self, rows: Sequence[Metrics]) -> None:
        """Rewrites the file with these rows alone."""
        self.file.close()
        write_aside(self.path, "".join(to_json(row) + "\n" for row in rows))
        self.file = self.path.open("a")

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


class TensorBoardTracker:
    """Event files in run_dir/tensorboard."""

    def __init__(self, run_dir: Path, step: int):
        self.run_dir = run_dir
        self._open(step)

    def _open(self, step: int) -> None:
        """Starts an event file that hides later steps of earlier files."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=step + 1)

    def rewind(self, rows: Sequence[Metrics]) -> None:
        """Continues after the last of these rows."""
        self.writer.close()
        self._open(rows[-1]["step"] if rows else 0)

    def log(self, metrics: Metrics) -> None:
        """Writes every number as a scalar."""
        for key, value in metrics.items():
            if isinstance(value, int | float) and key != "step":
                self.writer.add_scalar(key, value, metrics["step"])

    def close(self) -> None:
        """Writes buffered data and closes the file."""
        self.writer.close()


class ModuleTracker:
    """wandb or trackio, which share one interface."""

    def __init__(self, name: str, config: Config, run_dir: Path):
        self.module = __import__(name)
        self.module.init(project="mgrpo", name=run_dir.name, config=to_dict(config))

    def log(self, metrics: Metrics) -> None:
        """Sends every number."""
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        self.module.log(numbers, step=metrics["step"])

    def rewind(self, rows: Sequence[Metrics]) -> None:
        """Does nothing: the service keeps rows that were sent, and drops steps that it already has."""

    def close(self) -> None:
        """Ends the run in the service."""
        self.module.finish()


Tracker = JsonlTracker | TensorBoardTracker | ModuleTracker


def make_trackers(config: Config, run_dir: Path, step: int) -> list[Tracker]:
    """Opens metrics.jsonl and the trackers of --log.backends; `step` is the last step already written."""
    trackers: list[Tracker] = [JsonlTracker(run_dir / "metrics.jsonl")]
    for name in config.log.backends:
        try:
            if name == "tensorboard":
                trackers.append(TensorBoardTracker(run_dir, step))
            else:
                trackers.append(ModuleTracker(name, config, run_dir))
        except ImportError as error:
            raise ConfigError(
                [f"config: --log.backends must be installed, {name} is not. pip install {name}, or leave it out."]
            ) from error
    return trackers


def read_metrics(path: Path, *, up_to: int | None = None) -> list[Metrics]:
    """Reads metrics.jsonl up to a step; empty if there is no file."""
    return [row for row in (read_rows(path) if path.exists() else ()) if up_to is None or row["step"] <= up_to]


def read_rows(path: Path) -> Iterator[Metrics]:
    """Yields the rows of metrics.jsonl; a last line that a crash cut off is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: metrics must be readable, got: {reason}. Name the directory of a run.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise InputError(f"{path}:{number}: not valid JSON: {error}. Correct or remove the line.") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise InputError(
                f"{path}:{number}: must be an object with an integer `step`, got {row!r:.60}. Remove the line."
            )
        yield row
