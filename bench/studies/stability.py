"""The stability study: does label-free training collapse? `make study`.

Trains four arms with three seeds each on the built-in task, two one-thread runs at a time, and writes a figure and a
table of the results. Finished runs are kept, so an interrupted study continues.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import tyro
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mgrpo.observe.trackers import read_metrics
from mgrpo.types import Metrics

# arm: title, flags after the preset
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "srt": ("SRT", ("srt",)),
    "no_filter": ("M-GRPO without the filter", ("mgrpo_arithmetic", "--filter.applies-to", "none")),
    "mgrpo": ("M-GRPO", ("mgrpo_arithmetic",)),
    "anchored": ("anchored", ("anchored",)),
}
COLORS = {"srt": "#d55e00", "no_filter": "#e69f00", "mgrpo": "#0072b2", "anchored": "#009e73"}


@dataclass(frozen=True, kw_only=True)
class StudyArgs:
    """Runs to train."""

    out: Path = Path("study")
    """Directory of runs, figure and table."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Arms to train and draw."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every arm."""
    steps: int = 600
    """Steps of every run."""
    parallel: int = 2
    """Concurrent runs, one CPU thread each."""
    flags: tuple[str, ...] = ()
    """Additional flags for every run, such as --model.path=DIR."""


def train(args: StudyArgs, arm: str, seed: int) -> None:
    """Trains one run unless it is finished; an interrupted run is resumed."""
    run_dir = args.out / f"{arm}-{seed}"
    rows = read_metrics(run_dir / "metrics.jsonl")
    if rows and rows[-1]["step"] == args.steps:
        return
    command = [sys.executable, "-m", "mgrpo.train", *ARMS[arm][1], *args.flags, "--run-dir", str(run_dir)]
    command += [
        "--seed",
        str(seed),
        "--steps",
        str(args.steps),
        "--threads",
        "1",
        "--log.backends",
        "--eval.every",
        "50",
    ]
    command += ["--log.kl-initial-every", "0", "--checkpoint.every", "200", "--checkpoint.keep-last", "1"]
    resumable = (run_dir / "checkpoints").is_dir()
    if not resumable and run_dir.is_dir():
        for path in run_dir.iterdir():
            path.unlink() if path.is_file() else None
    start = time.monotonic()
    log = args.out / f"{arm}-{seed}.log"
    with log.open("a") as file:
        code = subprocess.call(command + ["--resume"] * resumable, stdout=file, stderr=file)
    if code:
        raise RuntimeError(f"study: run {arm}, seed {seed} must exit with 0, got {code}. See {log}.")
    print(f"{arm} seed {seed}: {args.steps} steps in {time.monotonic() - start:.0f} s", flush=True)


def summarize(runs: Sequence[Sequence[Metrics]]) -> dict[str, list[float]]:
    """For each run, best and final accuracy on the eval set, and concentration, entropy and reward at the end."""
    out: dict[str, list[float]] = {}
    for rows in runs:
        for key, name in (("probe_greedy_policy", "greedy"), ("probe_accuracy_policy", "sampled")):
            values = [row[key] for row in rows if row.get(key) is not None]
            out.setdefault(f"{name} best", []).append(max(values))
            out.setdefault(f"{name} final", []).append(values[-1])
        last = rows[-20:]
        for key in ("top_answer_share", "token_entropy", "reward_mean", "vote_accuracy"):
            out.setdefault(key, []).append(mean(row[key] for row in last))
    return out


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """A Markdown table: mean and standard deviation over seeds."""
    columns = {
        "greedy best": "greedy, best",
        "greedy final": "greedy, final",
        "sampled best": "sampled, best",
        "sampled final": "sampled, final",
        "top_answer_share": "commonest answer",
        "token_entropy": "entropy, nats",
        "reward_mean": "reward",
        "vote_accuracy": "vote accuracy",
    }
    lines = ["| arm | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for arm, values in results.items():
        cells = [
            f"{mean(values[key]):.3f} ± {stdev(values[key]) if len(values[key]) > 1 else 0:.3f}" for key in columns
        ]
        lines.append(f"| {ARMS[arm][0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(runs: dict[str, list[list[Metrics]]], path: Path) -> None:
    """Four panels, with a thin line for each seed and a thick line for their mean."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    panels = (
        ("probe_greedy_policy", "Greedy accuracy on the eval set", 1),
        ("reward_mean", "Reward: share of rollouts that agree with the vote", 20),
        ("vote_accuracy", "Accuracy of the pseudo-labels", 20),
        ("top_answer_share", "Share of the commonest answer over different prompts", 20),
    )
    for axis, (key, title, window) in zip(axes.flat, panels, strict=True):
        for arm, rows_by_seed in runs.items():
            _draw_arm(axis, key, window, rows_by_seed, ARMS[arm][0], COLORS[arm])
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def _draw_arm(axis: Axes, key: str, window: int, runs: list[list[Metrics]], label: str, color: str) -> None:
    """One arm in one panel; values are means over `window` steps."""
    curves = []
    for rows in runs:
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        blocks = [points[i : i + window] for i in range(0, len(points) - window + 1, window)]
        curve = [(block[-1][0], mean(value for _, value in block)) for block in blocks]
        curves.append(curve)
        axis.plot(*zip(*curve, strict=True), color=color, alpha=0.3, linewidth=1)
    middle = [(points[0][0], mean(value for _, value in points)) for points in zip(*curves, strict=False)]
    axis.plot(*zip(*middle, strict=True), color=color, linewidth=2.2, label=label)


def main() -> None:
    """Runs the study."""
    args = tyro.cli(StudyArgs, description=__doc__)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    jobs = [(arm, seed) for seed in args.seeds for arm in args.arms]
    with ThreadPoolExecutor(args.parallel) as pool:
        for future in [pool.submit(train, args, *job) for job in jobs]:
            future.result()
    runs = {
        arm: [read_metrics(args.out / f"{arm}-{seed}" / "metrics.jsonl") for seed in args.seeds] for arm in args.arms
    }
    results = {arm: summarize(rows) for arm, rows in runs.items()}
    text = table(results)
    (args.out / "table.md").write_text(text)
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    draw(runs, args.out / "study.png")
    print(text)
    print(f"{args.out / 'study.png'}, {args.out / 'table.md'}: {(time.monotonic() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
