"""Records of benchmark runs: JSON a run, and the Markdown made of them by `python -m bench.records`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from bench import measure
from bench.harness import PROTOCOL, Result, package_version

_HERE = Path(__file__).parent
_RECORDS = _HERE / "records"
_PAGE = _HERE / "RECORDS.md"


def _number(value: float | None, places: int | None = None) -> str:
    """Three significant digits, or a fixed number of places."""
    if value is None:
        return "-"
    if places is not None:
        return f"{value:,.{places}f}"
    return f"{value:,.{max(0, 2 - len(str(int(abs(value)))) + 1)}f}" if abs(value) >= 0.1 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    """Two decimals below ten, one above."""
    return "-" if value is None else f"{value:.2f}x" if value < 10 else f"{value:,.1f}x"


def _cells(row: dict[str, Any], unit: str | None) -> list[str]:
    """One line of a table."""
    package = f" ({row['package']})" if row["package"] and row["package"] not in row["candidate"] else ""
    name = row["candidate"] + package
    if row["status"] != "ok":
        return [name, f"{row['status']}: {row['detail']}", *["-"] * 6]
    times = f"{_number(row['ms'])} ({_number(row['ms_min'])})"
    rate = f"{_number(row['rate'])} {unit}" if row["rate"] is not None else "-"
    share = f"{row['roof_share']:.0%}" if row["roof_share"] is not None else "-"
    against = "" if row["error_against"] == "fp64" else f" to {row['error_against']}"
    error = "-" if row["error"] is None else f"{row['error']:.1e}{against}"
    ratio = "1" if row["backend"] else f"{_ratio(row['ratio'])} ({_ratio(row['ratio_least'])})"
    memory = [_number(row["peak_mib"], 0), _number(row["temporary_mib"], 0)]
    rounds = {1: ", once", 2: ", twice"}.get(row["rounds"], "")
    return [name, times + rounds, rate, share, *memory, error, ratio]


_HEADER = ["candidate", "ms", "rate", "of roof", "peak MiB", "temporary MiB", "error", "time / ours (least)"]


def _title(result: dict[str, Any]) -> str:
    """What was run, in a line."""
    parts = [result["op"], result["mode"], result["dtype"], result["shape"], "cold" if result["cold"] else "warm"]
    if result["roof"] is not None:
        kind = "mm" if result["unit"] == "GFLOP/s" else "copy"
        parts.append(f"{kind} roof {_number(result['roof'])} {result['unit']}")
    return ", ".join([*parts, f"load {result['load']:.1f}"])


def table(result: Result) -> str:
    """A case as aligned text."""
    data = asdict(result)
    lines = [_HEADER, *(_cells(row, data["unit"]) for row in data["rows"])]
    regular = [cells for cells in lines if not cells[1].startswith(("not installed", "failed", "differs"))]
    widths = [
        max(len(cells[column]) for cells in (lines if column == 0 else regular)) for column in range(len(_HEADER))
    ]
    text = [_title(data)]
    for cells in lines:
        odd = cells not in regular
        shown = cells[:2] if odd else cells
        tail = [cell if odd else cell.rjust(width) for cell, width in zip(shown[1:], widths[1:], strict=False)]
        text.append("  " + "  ".join([shown[0].ljust(widths[0]), *tail]))
    return "\n".join(text) + "\n"


def write(results: Sequence[Result]) -> list[Path]:
    """A record for every op of the run, in place of the former one; returns names relative to bench/."""
    packages = {row.package for result in results for row in result.rows if row.package}
    header = {
        "date": date.today().isoformat(),
        **measure.commit(),
        "device": measure.describe(),
        "packages": {name: package_version(name) for name in sorted(packages)},
        "protocol": PROTOCOL,
    }
    written = []
    for op in dict.fromkeys(result.op for result in results):
        cases = [_rounded(asdict(result)) for result in results if result.op == op]
        path = _RECORDS / "cpu" / f"{op.rstrip('_')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"op": op, **header, "cases": cases}, indent=1) + "\n")
        written.append(path.relative_to(_HERE))
    return written


def _rounded(value: Any) -> Any:
    """Floats to four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _section(record: dict[str, Any], name: str) -> list[str]:
    """Markdown of one op."""
    device = record["device"]
    changed = " with changes" if record["modified"] else ""
    peers = ", ".join(f"{package} {found or 'not installed'}" for package, found in record["packages"].items())
    lines = [
        f"## {record['op']}",
        "",
        f"{record['date']}, commit {(record['commit'] or 'unknown')[:12]}{changed}; {device['model']}, "
        f"{device['cores']} cores ({', '.join(device['isa'])}), {device['threads']} threads; torch {device['torch']}, "
        f"Python {device['python']}. Peers: {peers or 'torch'}. [Record]({name}).",
        "",
    ]
    for case in record["cases"]:
        lines += [f"### {_title(case)}", "", f"| {' | '.join(_HEADER)} |", "|---" * len(_HEADER) + "|"]
        lines += [
            f"| {' | '.join(cell.replace('|', '/') for cell in _cells(row, case['unit']))} |" for row in case["rows"]
        ]
        lines.append("")
    return lines


def page() -> str:
    """RECORDS.md from every record."""
    lines = ["# Records", "", "Made by `python -m bench.records` from the files in `records/`.", ""]
    paths = sorted(_RECORDS.glob("*/*.json"))
    protocols = dict.fromkeys(json.loads(path.read_text())["protocol"] for path in paths)
    for protocol in protocols:
        lines += [protocol, ""]
    for path in paths:
        lines += _section(json.loads(path.read_text()), path.relative_to(_HERE).as_posix())
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    _PAGE.write_text(page())
    print(f"wrote {_PAGE.name}")
