"""Numbers of a step, and where they are written: metrics.jsonl, TensorBoard and other trackers.

Letters: B prompts, M policy and N momentum rollouts a prompt, G = M + N.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mgrpo.config import Config, ConfigError, to_dict
from mgrpo.judging import Judgement

Metrics = dict[str, Any]


# Keys that every row has, null where one does not apply.
KEYS = (
    *("step", "loss", "reward_mean", "majority_share", "top_answer_share", "token_entropy", "response_length"),
    *("unparseable_share", "zero_signal_share", "pruned_share", "tie_share", "vote_agreement", "truncated_share"),
    *("distinct_answers", "pruned_length", "kept_length", "nonfinite_steps", "tis_mean", "tis_clipped_share"),
    *("logprob_gap", "kl", "kl_initial", "grad_norm", "lr", "tokens_per_s", "step_s", "time_rollout_s"),
    *("time_rollout_policy_s", "time_rollout_momentum_s", "time_score_s", "time_vote_s", "time_update_s"),
    *("time_ema_s", "time_publish_s", "time_checkpoint_s", "vote_accuracy", "probe_accuracy_policy"),
    *("probe_accuracy_momentum", "retention", "rollbacks", "time_monitor_s", "alarm"),
)


class StorageError(OSError):
    """Writing to the run directory failed."""


class Timer:
    """Adds up wall-clock seconds by phase; `metrics()` gives `time_<phase>_s`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times a block as part of `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self) -> Metrics:
        """Seconds of each phase so far."""
        return {f"time_{phase}_s": seconds for phase, seconds in self.seconds.items()}


@dataclass(frozen=True, kw_only=True)
class Outcome(Judgement):
    """What one rollout batch came to, before the update; policy rollouts first in G."""

    lengths: torch.Tensor  # [B, G] int64
    truncated: torch.Tensor  # [B, G] bool
    entropy: torch.Tensor  # [B, G] fp32, mean token entropy under the policy
    label_correct: list[bool]  # pseudo-label equals the true answer, for prompts that have one


def outcome_metrics(outcome: Outcome) -> Metrics:
    """Rewards, votes, lengths, answer concentration and pruning of one rollout batch; a share is in [0, 1]."""
    o, m = outcome, outcome.num_policy
    pruned = ~o.keep
    known = o.vote.agreement_known
    metrics: Metrics = {
        "reward_mean": mean(o.rewards[:, :m]),
        "top_answer": top_answer(o.answers)[0],
        "majority_share": mean(o.vote.share),
        "vote_agreement": mean(o.vote.agreement[known]) if known.any() else None,
        "tie_share": mean(o.vote.tie),
        "no_signal_share": mean(~o.vote.signal),
        "zero_signal_share": mean((o.advantage == 0).all(1)),
        "distinct_answers": mean([len({i for i in row if i >= 0}) for row in o.answer_ids.tolist()]),
        "response_length": mean(o.lengths),
        "truncated_share": mean(o.truncated),
        "pruned_share": mean(pruned),
        "pruned_length": mean(o.lengths[pruned]) if pruned.any() else None,
        "kept_length": mean(o.lengths[o.keep]) if o.keep.any() else None,
        "vote_accuracy": mean(o.label_correct) if o.label_correct else None,
    }
    sources = {"": slice(None), "_policy": slice(0, m), "_momentum": slice(m, None)}
    for suffix, columns in sources.items():
        ids = o.answer_ids[:, columns]
        if ids.shape[1] == 0:
            continue
        metrics["token_entropy" + suffix] = mean(weighted(o.entropy[:, columns], o.lengths[:, columns]))
        metrics["unparseable_share" + suffix] = mean(ids < 0)
        metrics["top_answer_share" + suffix] = top_answer(o.answers, columns)[1]
        if suffix:
            metrics["response_length" + suffix] = mean(o.lengths[:, columns])
    if m < o.answer_ids.shape[1]:
        metrics["reward_mean_momentum"] = mean(o.rewards[:, m:])
    return metrics


def top_answer(answers: Sequence[Sequence[str | None]], columns: slice = slice(None)) -> tuple[str | None, float]:
    """The commonest answer across different prompts, and the share of all rollouts that give it."""
    given = [answer for row in answers for answer in row[columns]]
    counts = Counter(answer for answer in given if answer is not None)
    if not counts:
        return None, 0.0
    answer, count = counts.most_common(1)[0]
    return answer, count / len(given)


def mean(values: torch.Tensor | Sequence[float]) -> float:
    """Mean as a float; 0 of nothing."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return float(values.mean()) if values.numel() else 0.0


def weighted(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean, 0-d; 0 where all weights are."""
    return (values * weights).sum() / weights.sum().clamp_min(1)


def to_json(metrics: Metrics) -> str:
    """One line of JSON; NaN and infinity become null."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()})


def write_aside(path: Path, text: str) -> None:
    """Replaces a text file at once or not at all, power cut or not."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


class Tracker(Protocol):
    """A place that takes one row of numbers a step."""

    def log(self, metrics: Metrics) -> None:
        """Writes the numbers of one step."""
        ...

    def rewind(self, rows: Sequence[Metrics]) -> None:
        """Takes back all but these rows."""
        ...

    def close(self) -> None:
        """Writes what is buffered."""
        ...


class JsonlTracker:
    """metrics.jsonl: one JSON object a step, flushed as it is written; NaN and infinity become null."""

    def __init__(self, path: Path):
        self.path, self.file = path, path.open("a")

    def log(self, metrics: Metrics) -> None:
        """Appends one line."""
        self.file.write(to_json(metrics) + "\n")
        self.file.flush()

    def rewind(self, rows: Sequence[Metrics]) -> None:
        """Leaves these rows alone in the file."""
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
        """Starts a file that hides what others hold of later steps."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=step + 1)

    def rewind(self, rows: Sequence[Metrics]) -> None:
        """Goes on after the last of these rows."""
        self.writer.close()
        self._open(rows[-1]["step"] if rows else 0)

    def log(self, metrics: Metrics) -> None:
        """Writes every number as a scalar."""
        for key, value in metrics.items():
            if isinstance(value, int | float) and key != "step":
                self.writer.add_scalar(key, value, metrics["step"])

    def close(self) -> None:
        """Writes what is buffered."""
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
        """Nothing: what was sent stays, and steps that were seen before are dropped there."""

    def close(self) -> None:
        """Ends the run there."""
        self.module.finish()


def make_trackers(config: Config, run_dir: Path, step: int) -> list[Tracker]:
    """Opens metrics.jsonl and the trackers of --log.backends; `step` is the last one already written."""
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
    """Reads metrics.jsonl up to a step; a last line cut off by a crash is left out."""
    rows: list[Metrics] = []
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise
        if up_to is None or row["step"] <= up_to:
            rows.append(row)
    return rows
