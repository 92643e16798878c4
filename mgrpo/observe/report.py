"""Report of one or several runs: report.html and plots/*.png."""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgrpo.errors import InputError
from mgrpo.observe.catalogue import METRICS
from mgrpo.observe.plots import Run, draw_figures, find_alarms, points
from mgrpo.observe.trackers import read_rows

MAX_ALARMS = 20

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 1rem 0; } th { text-align: left; font-weight: 600; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } td small { color: #666; }
.alarms { background: #fdf0e6; border-left: 4px solid #d55e00; padding: .6rem 1rem; }
figure { margin: 1.6rem 0; } img { max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: .85rem; }
"""


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes report.html and plots/*.png, and returns the path of the report.

    Args:
        run_dirs: run directories with metrics.jsonl and usually config.json; several are drawn together.
        out: folder to write, created if missing. None is the run directory of a single run, or the folder `report`
            beside several.

    Raises:
        InputError: no run, a missing directory or metrics, or a damaged file.
        OSError: the report cannot be written.
    """
    folders = list(dict.fromkeys(Path(run_dir).resolve() for run_dir in run_dirs))
    if not folders:
        raise InputError("report: run_dirs must name at least one run directory, got none.")
    parent = Path(os.path.commonpath([folder.parent for folder in folders]))
    runs = [read_run(folder, name=str(folder.relative_to(parent))) for folder in folders]
    if out is None:
        out = folders[0] if len(folders) == 1 else parent / "report"
    (out / "plots").mkdir(parents=True, exist_ok=True)
    images = []
    for name, figure in draw_figures(runs).items():
        path = out / "plots" / f"{name}.png"
        figure.savefig(path)
        images.append((figure.get_suptitle(), path.read_bytes()))
    report = out / "report.html"
    report.write_text(make_html(runs, images), encoding="utf-8")
    return report


def read_run(folder: Path, *, name: str) -> Run:
    """Reads metrics.jsonl and config.json of a run directory; the later of two rows of a step counts."""
    if not folder.is_dir():
        raise InputError(f"report: run directory must exist, got {folder}. Check the path.")
    rows = {row["step"]: row for row in read_rows(folder / "metrics.jsonl")}
    if not rows:
        raise InputError(f"{folder / 'metrics.jsonl'}: must hold at least one step, got none. Train for a step first.")
    config: dict[str, Any] = {}
    path = folder / "config.json"
    if path.exists():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON: {error}. Restore the file or remove it.") from error
        if not isinstance(config, dict):
            raise InputError(f"{path}: must hold an object, got {config!r:.40}. Restore the file or remove it.")
    return Run(name=name, rows=[rows[step] for step in sorted(rows)], config=config)


def make_html(runs: Sequence[Run], images: Sequence[tuple[str, bytes]]) -> str:
    """Makes the page; all text of a run is escaped.

    Args:
        runs: the runs to describe.
        images: title and PNG of each plot.
    """
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [part for run in runs for part in _describe(run, heading=len(runs) > 1)]
    parts.append("<h2>Plots</h2>")
    parts += [
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
        for name, png in images
    ]
    parts += ["<h2>Configuration</h2>", *map(_configuration, runs)]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _describe(run: Run, *, heading: bool) -> list[str]:
    """The settings, alarms and key numbers of a run."""
    parts = [f"<h2>{html.escape(run.name)}</h2>"] if heading else []
    last = run.rows[-1]["step"]
    facts = {
        "preset": _setting(run, "preset"),
        "model": _setting(run, "model", "path"),
        "data": _setting(run, "data", "train"),
        "steps": f"{last} of {_setting(run, 'steps')}",
        "seed": _setting(run, "seed"),
    }
    if trained := run.rows[-1].get("trained_parameters"):
        facts["trained parameters (LoRA)"] = f"{trained:,}"
    listed = " · ".join(f"{name} <b>{html.escape(value)}</b>" for name, value in facts.items())
    parts.append(f"<p>{listed}</p>")
    if alarms := list(find_alarms(run)):
        items = "".join(f"<li>step {step}: {html.escape(text)}</li>" for step, text in alarms[:MAX_ALARMS])
        more = f"<p>and {len(alarms) - MAX_ALARMS} more</p>" if len(alarms) > MAX_ALARMS else ""
        parts.append(f'<div class="alarms"><b>Alarms</b><ul>{items}</ul>{more}</div>')
    parts.append(_number_table(run))
    return parts


def _setting(run: Run, *path: str) -> str:
    """One value of the configuration as text, `unknown` if missing."""
    value: Any = run.config
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return "unknown" if value is None else str(value)


def _number_table(run: Run) -> str:
    """First, best and last value of each key number that the run has."""
    lines = ["<tr><th>metric</th><th>first</th><th>best</th><th>last</th></tr>"]
    for key, metric in METRICS.items():
        steps, values = points(run, key)
        if not metric.summary or not values:
            continue
        best = ""
        if metric.better is not None:
            value = max(values) if metric.better == "more" else min(values)
            best = f"{value:.4g} <small>step {steps[values.index(value)]}</small>"
        cells = "".join(f'<td class="number">{cell}</td>' for cell in (f"{values[0]:.4g}", best, f"{values[-1]:.4g}"))
        lines.append(f"<tr><td>{metric.label}</td>{cells}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _configuration(run: Run) -> str:
    """The resolved configuration as a collapsed section."""
    text = html.escape(json.dumps(run.config, indent=2))
    return f"<details><summary>{html.escape(run.name)}</summary><pre>{text}</pre></details>"
