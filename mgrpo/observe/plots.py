"""Draws the plots of one or several runs."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from mgrpo.observe.catalogue import FIGURES, PANELS, Panel, keys_of

MAX_BARE_POINTS = 30  # more points get a running mean drawn over them
DPI = 100
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")  # Okabe and Ito
LINES = ("-", "--", ":", "-.")  # one for each pass through the colours
# Phases timed inside another one.
NESTED = {"rollout": ("publish", "rollout_policy", "rollout_momentum"), "update": ("ema",)}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Metrics of a run in the order of steps, and its configuration."""

    name: str
    rows: list[dict[str, Any]]
    config: dict[str, Any]


Axis = tuple[Panel, dict[str, str]]
"""A panel, with the keys and labels of its metrics."""


def points(run: Run, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric at the steps where it is a finite number."""
    known = [row for row in run.rows if type(row.get(key)) in (int, float) and math.isfinite(row[key])]
    return [row["step"] for row in known], [float(row[key]) for row in known]


def find_alarms(run: Run) -> Iterator[tuple[int, str]]:
    """Step and text of every alarm."""
    for row in run.rows:
        alarm = row.get("alarm") or []
        for text in [alarm] if isinstance(alarm, str) else alarm:
            yield row["step"], str(text)


def draw_figures(runs: Sequence[Run]) -> dict[str, Figure]:
    """Draws every plot that has data; metrics of one run share axes, those of several runs have separate ones."""
    axes: list[Axis] = [(panel, keys_of(name)) for name, panel in PANELS.items()]
    if len(runs) > 1:
        axes = [
            (panel if label == panel.title else panel._replace(title=f"{panel.title}: {label}"), {key: label})
            for panel, keys in axes
            for key, label in keys.items()
        ]
    figures = {}
    for name, title in FIGURES.items():
        of_figure = [(panel, keys) for panel, keys in axes if panel.figure == name]
        if filled := [axis for axis in of_figure if any(points(run, key)[1] for run in runs for key in axis[1])]:
            figures[name] = _draw_figure(title, filled, runs)
    return figures


def _draw_figure(title: str, panels: Sequence[Axis], runs: Sequence[Run]) -> Figure:
    """Stacks the panels of one run, or puts those of several in two columns with one legend."""
    columns = 1 if len(runs) == 1 else 2
    num_rows = math.ceil(len(panels) / columns)
    height = 3.6 if num_rows == 1 else 2.5 * num_rows + 0.5
    figure = Figure(figsize=(9.5, height), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    grid = figure.subplots(num_rows, columns, sharex=True, squeeze=False).flatten()
    for i, (axes, (panel, keys)) in enumerate(zip(grid, panels, strict=False)):
        axes.set_title(panel.title, loc="left", fontsize=10.5, color="#444444")
        axes.set_xlabel("step" if i >= len(panels) - columns else "")
        axes.tick_params(labelbottom=True)
        _draw_panel(axes, panel, keys, runs)
        if len(runs) == 1 and (alarm := next(find_alarms(runs[0]), None)):
            axes.axvline(
                alarm[0], color="#b00000", linestyle=":", linewidth=1.2, label="first alarm" if i == 0 else None
            )
        if len(runs) == 1 and len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03), frameon=False, fontsize=9.5)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    if len(runs) > 1:
        handles = [Line2D([], [], label=run.name, **_style(i)) for i, run in enumerate(runs)]
        figure.legend(handles=handles, loc="outside lower left", ncols=min(len(runs), 4), frameon=False)
    return figure


def _draw_panel(axes: Axes, panel: Panel, keys: dict[str, str], runs: Sequence[Run]) -> None:
    """Draws the lines of one panel, or the phases of a run's steps, and scales the axes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    if len(runs) == 1 and "step_s" in keys and (phases := _phases(runs[0])):
        steps = [row["step"] for row in runs[0].rows]
        axes.stackplot(steps, list(phases.values()), labels=list(phases), colors=COLOURS)
    else:
        for i, (run, (key, label)) in enumerate(itertools.product(runs, keys.items())):
            _draw_line(axes, *points(run, key), label=label, style=_style(i))
    if panel.log and any(np.any(np.asarray(line.get_ydata()) > 0) for line in axes.get_lines()):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.share:
        axes.set_ylim(bottom=0, top=1.02 if axes.get_ylim()[1] > 0.5 else None)


def _style(i: int) -> dict[str, Any]:
    """Colour of the i-th line, and its style, which changes with each pass through the colours."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // len(COLOURS) % len(LINES)]}


def _draw_line(axes: Axes, steps: list[int], values: list[float], *, label: str, style: dict[str, Any]) -> None:
    """Draws few values as points, many as a faint line under their running mean."""
    if not values:
        return
    if len(values) <= MAX_BARE_POINTS:
        axes.plot(steps, values, marker="o", markersize=3.5, linewidth=1.6, label=label, **style)
    else:
        axes.plot(steps, values, color=style["color"], alpha=0.22, linewidth=0.9)
        axes.plot(steps, running_mean(values), linewidth=1.8, label=label, **style)


def running_mean(values: Sequence[float]) -> np.ndarray:
    """Centred mean over a twentieth of the values, an odd number of them; the window is cut at the ends."""
    window = np.ones(len(values) // 20 | 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _phases(run: Run) -> dict[str, np.ndarray]:
    """Seconds of each phase at every step without those of nested phases, longest first, the shortest summed."""
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
