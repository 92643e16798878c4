"""Plots of one or several runs: which metrics share axes, and how they are drawn."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

MAX_BARE_POINTS = 30  # up to here points are joined as they are; past it a running mean is drawn over them
DPI = 100
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")  # Okabe and Ito
LINES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")  # one a round through the colours
# Phases timed inside another one.
NESTED = {"rollout": ("publish", "rollout_policy", "rollout_momentum"), "update": ("ema",)}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Metrics of a run in the order of steps, and its configuration."""

    name: str
    rows: list[dict[str, Any]]
    config: dict[str, Any]


class Panel(NamedTuple):
    """Metrics that share one pair of axes."""

    plot: str  # name of the figure
    title: str
    keys: dict[str, str]  # metric: label
    share: bool = False  # values in [0, 1]
    log: bool = False


TITLES = {
    "reward": "Reward against accuracy: a reward that rises while accuracy falls is collapse",
    "entropy": "Entropy",
    "answers": "Concentration of answers",
    "lengths": "Lengths of responses",
    "signal": "What gives no signal",
    "momentum": "Policy against momentum",
    "time": "Time of a step",
    "optimisation": "Optimisation",
}
PROBE = {
    "probe_accuracy_policy": "probe accuracy, policy",
    "probe_accuracy_momentum": "probe accuracy, momentum",
}
REWARD = {"reward_mean": "reward", "majority_share": "majority share", "vote_accuracy": "vote accuracy"}
LENGTHS = {"response_length": "all", "kept_length": "kept", "pruned_length": "pruned by the filter"}
NO_SIGNAL = {
    "pruned_share": "rollouts pruned by the filter",
    "zero_signal_share": "prompts without signal",
    "tie_share": "prompts with a tie",
    "unparseable_share": "rollouts without answer",
}
BY_SOURCE = {
    "token_entropy": "entropy, nats",
    "top_answer_share": "share of the commonest answer",
    "majority_share": "share of the majority",
    "unparseable_share": "share without answer",
    "response_length": "length, tokens",
}
PANELS = (
    Panel("reward", "share", REWARD | PROBE, share=True),
    Panel("entropy", "nats a token", {"token_entropy": "token entropy"}),
    Panel("answers", "share of rollouts", {"top_answer_share": "commonest answer of all prompts"}, share=True),
    Panel("answers", "answers a prompt", {"distinct_answers": "distinct answers"}),
    Panel("lengths", "tokens", LENGTHS),
    Panel("lengths", "share of rollouts", {"truncated_share": "cut at the length limit"}, share=True),
    Panel("signal", "share", NO_SIGNAL, share=True),
    Panel("momentum", "share of prompts", {"vote_agreement": "votes agree"} | PROBE, share=True),
    *(
        Panel("momentum", title, {f"{key}_policy": "policy", f"{key}_momentum": "momentum"}, share="share" in title)
        for key, title in BY_SOURCE.items()
    ),
    Panel("time", "seconds a step", {"step_s": "whole step"}),
    Panel("time", "tokens a second", {"tokens_per_s": "throughput"}),
    Panel("optimisation", "loss", {"loss": "loss"}),
    Panel("optimisation", "gradient norm", {"grad_norm": "before clipping"}, log=True),
    Panel("optimisation", "KL, nats a token", {"kl": "to the reference", "kl_initial": "to the initial model"}),
    Panel("optimisation", "learning rate", {"lr": "learning rate"}),
)


def points(run: Run, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric where it is a finite number."""
    values = [row.get(key) for row in run.rows]
    known = [isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values]
    steps = [row["step"] for row in run.rows]
    return list(itertools.compress(steps, known)), [
        float(v) for v in itertools.compress(values, known) if v is not None
    ]


def find_alarms(run: Run) -> Iterator[tuple[int, str]]:
    """Step and text of every alarm."""
    for row in run.rows:
        alarm = row.get("alarm") or []
        for text in [alarm] if isinstance(alarm, str) else alarm:
            yield row["step"], str(text)


def draw_figures(runs: Sequence[Run]) -> dict[str, Figure]:
    """Draws every plot that has data; metrics of one run share axes, of several runs each metric has its own."""
    panels: Sequence[Panel] = PANELS
    if len(runs) > 1:
        panels = [
            panel._replace(title=panel.title if label == panel.title else f"{panel.title}: {label}", keys={key: label})
            for panel in PANELS
            for key, label in panel.keys.items()
        ]
    figures = {}
    for name, title in TITLES.items():
        filled = [p for p in panels if p.plot == name and any(points(run, key)[1] for run in runs for key in p.keys)]
        if filled:
            figures[name] = _draw_figure(title, filled, runs)
    return figures


def _draw_figure(title: str, panels: Sequence[Panel], runs: Sequence[Run]) -> Figure:
    """Stacks the panels of one run, or lays those of several out in two columns under one legend."""
    columns = 1 if len(runs) == 1 else 2
    num_rows = math.ceil(len(panels) / columns)
    height = 3.6 if num_rows == 1 else 2.5 * num_rows + 0.5
    figure = Figure(figsize=(9.5, height), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    grid = figure.subplots(num_rows, columns, sharex=True, squeeze=False).flatten()
    for i, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
        axes.set_title(panel.title, loc="left", fontsize=10.5, color="#444444")
        axes.set_xlabel("step" if i >= len(panels) - columns else "")
        axes.tick_params(labelbottom=True)
        _draw_panel(axes, panel, runs)
        if len(runs) == 1 and (alarm := next(find_alarms(runs[0]), None)):
            axes.axvline(
                alarm[0], color="#b00000", linestyle=":", linewidth=1.2, label="first alarm" if i == 0 else None
            )
        if len(runs) == 1 and len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03), frameon=False, fontsize=9.5)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    if len(runs) > 1:
        handles = [Line2D([], [], color=_colour(i), linestyle=_line(i), label=run.name) for i, run in enumerate(runs)]
        figure.legend(handles=handles, loc="outside lower left", ncols=min(len(runs), 4), frameon=False)
    return figure


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    """Draws the lines of one panel, or the phases of a run's steps, and scales the axes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    if len(runs) == 1 and "step_s" in panel.keys and (phases := _phases(runs[0])):
        steps = [row["step"] for row in runs[0].rows]
        axes.stackplot(steps, list(phases.values()), labels=list(phases), colors=COLOURS)
    else:
        for i, (run, (key, label)) in enumerate(itertools.product(runs, panel.keys.items())):
            _draw_line(axes, *points(run, key), label=label, colour=_colour(i), line=_line(i))
    if panel.log:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.share:
        axes.set_ylim(bottom=0, top=1.02 if axes.get_ylim()[1] > 0.5 else None)


def _colour(i: int) -> str:
    """Colour of the i-th line."""
    return COLOURS[i % len(COLOURS)]


def _line(i: int) -> Literal["-", "--", ":", "-."]:
    """Style of the i-th line: another one each time the colours are used up."""
    return LINES[i // len(COLOURS) % len(LINES)]


def _draw_line(axes: Axes, steps: list[int], values: list[float], *, label: str, colour: str, line: str) -> None:
    """Draws few values as points, many as a faint line under their running mean."""
    if not values:
        return
    if len(values) <= MAX_BARE_POINTS:
        axes.plot(steps, values, line, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=label)
    else:
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.9)
        axes.plot(steps, running_mean(values), line, color=colour, linewidth=1.8, label=label)


def running_mean(values: Sequence[float]) -> np.ndarray:
    """Centred mean over a twentieth of the values, an odd number of them; the window is cut at the ends."""
    window = np.ones(len(values) // 20 | 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _phases(run: Run) -> dict[str, np.ndarray]:
    """Seconds of each phase at every step less those of the phases inside it, longest first, the last few summed."""
    matches = {key: re.fullmatch(r"time_(\w+)_s", key) for row in run.rows for key in row}
    seconds = {match[1]: np.array([row.get(key) or 0.0 for row in run.rows]) for key, match in matches.items() if match}
    own = {
        phase: (total - sum(seconds.get(inner, 0.0) for inner in NESTED.get(phase, ()))).clip(0)
        for phase, total in seconds.items()
    }
    ranked = sorted((phase for phase in own if own[phase].any()), key=lambda phase: -own[phase].sum())
    shown = {phase.replace("_", " "): own[phase] for phase in ranked[: len(COLOURS) - 1]}
    rest = [own[phase] for phase in ranked[len(COLOURS) - 1 :]]
    return shown | ({"others": np.sum(rest, axis=0)} if rest else {})


def render_png(figure: Figure) -> bytes:
    """Renders a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
