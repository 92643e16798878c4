"""Steps at which the monitor alarms, in collapsing and in stable runs: `python -m bench.studies.collapse`.

Two kinds of collapse: `spread`, the shipped base on 3 to 7 operands, where accuracy falls level by level and answers
stay diverse; `gather`, a base that guesses from 4 operands on, where most prompts get the same answer. The monitor sees
no label and no eval set; greedy accuracy on 2,500 fixed prompts is measured every 10 steps for comparison.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from mgrpo.config import Config, MonitorConfig
from mgrpo.evaluation.evaluate import evaluate
from mgrpo.models.files import quiet_transformers
from mgrpo.observe.collapse import Monitor
from mgrpo.presets import make_preset
from mgrpo.tasks.arithmetic import BaseArgs, make_base
from mgrpo.training.trainer import Trainer
from mgrpo.types import Metrics, Sampling

ARMS = {"srt": "srt", "pooled": "mgrpo_arithmetic", "anchored": "arithmetic"}
EVERY = 10  # steps between evaluations
SMOOTH = 3  # evaluations averaged
LOST = 0.05  # fall of the averaged accuracy from its best


@dataclass(frozen=True, kw_only=True)
class CollapseArgs:
    """Runs to train. Existing runs in the folder are evaluated only."""

    out: Path = Path("collapse")
    """Folder of the runs, the base that guesses, and the table."""
    kinds: tuple[str, ...] = ("spread", "gather")
    """Kinds of collapse."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Arms: `srt` collapses, `pooled` is the paper's vote, `anchored` the default of the built-in task."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of every arm."""
    steps: int = 300
    """Largest number of steps of a run; it ends earlier after a loss of 6 points."""
    parallel: int = 2
    """Concurrent runs, one CPU thread each."""


def make_config(args: CollapseArgs, kind: str, arm: str, seed: int) -> Config:
    """A preset without evaluation."""
    base = make_preset(ARMS[arm])
    config = replace(
        base,
        seed=seed,
        steps=args.steps,
        data=replace(base.data, probe="arithmetic:2500:3-7:1000003"),
        eval=replace(base.eval, every=0),
        log=replace(base.log, kl_initial_every=0, backends=()),
    )
    if kind == "spread":
        return config
    return replace(
        config,
        model=replace(base.model, path=str(args.out / "guessing_base")),
        data=replace(base.data, train="arithmetic:8192:2-5:0", probe="arithmetic:2500:2-5:1000003"),
        rollout=replace(base.rollout, max_new_tokens=32),
    )


def train(args: CollapseArgs, kind: str, arm: str, seed: int) -> None:
    """Trains one run and writes its metrics, with greedy accuracy as `probe` every 10 steps."""
    path = args.out / f"{kind}-{arm}-{seed}.jsonl"
    if path.exists():
        return
    torch.set_num_threads(1)
    quiet_transformers()
    trainer = Trainer(make_config(args, kind, arm, seed))
    rows: list[Metrics] = []
    while trainer.step < args.steps and not fell(rows, 0.06):
        row = trainer.train_step().metrics
        if trainer.step % EVERY == 0:
            row["probe"] = greedy_accuracy(trainer)
        rows.append(row)
    trainer.close()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path.name}: {len(rows)} steps", flush=True)


def greedy_accuracy(trainer: Trainer) -> float:
    """Greedy accuracy of the policy on the eval set."""
    assert trainer.probe is not None
    sampling = Sampling(temperature=0.0, max_new_tokens=trainer.config.rollout.max_new_tokens)
    return evaluate(
        trainer.engine,
        trainer.loaded,
        trainer.probe,
        trainer.grader.extract,
        trainer.grader.checker,
        sampling,
        samples=1,
        tag=trainer.generator.update_weights("policy"),
        greedy=False,
    ).avg_at_k


def smoothed(rows: Sequence[Metrics]) -> list[tuple[int, float]]:
    """Step and mean of the last three evaluations."""
    probe = [(row["step"], row["probe"]) for row in rows if "probe" in row]
    means = [
        (probe[i][0], sum(value for _, value in probe[i + 1 - SMOOTH : i + 1]) / SMOOTH) for i in range(len(probe))
    ]
    return means[SMOOTH - 1 :]


def fell(rows: Sequence[Metrics], loss: float = LOST) -> int | None:
    """First step at which the smoothed accuracy is `loss` below its best; None if it never is."""
    best = 0.0
    for step, value in smoothed(rows):
        best = max(best, value)
        if value < best - loss:
            return step
    return None


def first_alarm(rows: Sequence[Metrics], num_prompts: int = 16) -> tuple[int, str] | None:
    """Step and reason of the first alarm of the current monitor on a run's rows."""
    monitor = Monitor(MonitorConfig(), num_prompts=num_prompts)
    for row in rows:
        if reasons := monitor.observe({key: value for key, value in row.items() if not key.startswith("probe")}):
            return row["step"], reasons[0]
    return None


def table(args: CollapseArgs) -> str:
    """A Markdown table with one line for each run."""
    lines = ["| run | accuracy, best | last | 5 points lost at step | first alarm at step | reason |", "|---" * 6 + "|"]
    for path in sorted(args.out.glob("*-*-*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        values, alarm = [value for _, value in smoothed(rows)], first_alarm(rows)
        step, reason = alarm or ("none", "")
        lines.append(
            f"| {path.stem.replace('-', ' ')} | {max(values):.3f} | {values[-1]:.3f} (step {rows[-1]['step']}) "
            f"| {fell(rows) or 'never'} | {step} | {reason} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains the missing runs and writes the table."""
    args = tyro.cli(CollapseArgs, description=__doc__)
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / "guessing_base"
    if "gather" in args.kinds and not base.exists():
        make_base(BaseArgs(out=base, operands=(2, 3, 4, 5), guess=(4, 5), steps=1500))
    jobs = [(kind, arm, seed) for arm in args.arms for seed in args.seeds for kind in args.kinds]
    with ProcessPoolExecutor(args.parallel, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(train, args, *job) for job in jobs]:
            future.result()
    text = table(args)
    (args.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
