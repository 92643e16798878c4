"""Records of benchmark runs as JSON, and the Markdown page of them by `python -m bench.records`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from bench.harness.case import Result, meter, package_version
from bench.harness.measure import commit

_HERE = Path(__file__).parent
RECORDS = _HERE / "records"
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


def _cells(row: dict[str, Any], unit: str | None, columns: Sequence[str]) -> list[str]:
    """One line of a table."""
    package = f" ({row['package']})" if row["package"] and row["package"] not in row["candidate"] else ""
    name = row["candidate"] + package
    if row["status"] != "ok":
        return [name, f"{row['status']}: {row['detail']}", *["-"] * (len(columns) - 2)]
    times = f"{_number(row['ms'])} ({_number(row['ms_min'])})"
    rate = f"{_number(row['rate'])} {unit}" if row["rate"] is not None else "-"
    share = f"{row['roof_share']:.0%}" if row["roof_share"] is not None else "-"
    against = "" if row["error_against"] == "fp64" else f" to {row['error_against']}"
    error = "-" if row["error"] is None else f"{row['error']:.1e}{against}"
    ratio = "1" if row["backend"] else f"{_ratio(row['ratio'])} ({_ratio(row['ratio_least'])})"
    memory = [_number(row["peak_mib"], 0), _number(row["temporary_mib"], 0)]
    rounds = {1: ", once", 2: ", twice"}.get(row["rounds"], "")
    host = [_number(row["host_ms"])] if "host ms" in columns else []
    return [name, times + rounds, rate, share, *memory, error, ratio, *host]


_HEADER = ["candidate", "ms", "rate", "of roof", "peak MiB", "temporary MiB", "error", "time / ours (least)"]


def _columns(result: dict[str, Any]) -> list[str]:
    """Headings of a case's table, with host times if measured."""
    return _HEADER + ["host ms"] * any(row.get("host_ms") is not None for row in result["rows"])


def _title(result: dict[str, Any]) -> str:
    """Title of a case's table: operation, mode, dtype, shape, state of the cache, roof and load."""
    parts = [result["op"], result["mode"], result["dtype"], result["shape"], "cold" if result["cold"] else "warm"]
    if result["roof"] is not None:
        kind = "mm" if result["unit"].endswith("FLOP/s") else "copy"
        parts.append(f"{kind} roof {_number(result['roof'])} {result['unit']}")
    return ", ".join(parts if result["load"] is None else [*parts, f"load {result['load']:.1f}"])


def table(result: Result) -> str:
    """A case as aligned text."""
    data = asdict(result)
    columns = _columns(data)
    lines = [columns, *(_cells(row, data["unit"], columns) for row in data["rows"])]
    regular = [cells for cells in lines if not cells[1].startswith(("not installed", "failed", "differs"))]
    widths = [
        max(len(cells[column]) for cells in (lines if column == 0 else regular)) for column in range(len(columns))
    ]
    text = [_title(data)]
    for cells in lines:
        odd = cells not in regular
        shown = cells[:2] if odd else cells
        tail = [cell if odd else cell.rjust(width) for cell, width in zip(shown[1:], widths[1:], strict=False)]
        text.append("  " + "  ".join([shown[0].ljust(widths[0]), *tail]))
    return "\n".join(text) + "\n"


def write(results: Sequence[Result], device: str = "cpu", folder: Path = RECORDS) -> list[Path]:
    """Replaces the record of every operation in the run, in the device's folder; returns the paths."""
    used = meter(device)
    packages = {row.package for result in results for row in result.rows if row.package}
    header = {
        "date": date.today().isoformat(),
        **commit(),
        "device": used.describe(),
        "packages": {name: package_version(name) for name in sorted(packages)},
        "protocol": used.PROTOCOL,
    }
    written = []
    for op in dict.fromkeys(result.op for result in results):
        cases = [_rounded(asdict(result)) for result in results if result.op == op]
        path = folder / used.slug() / f"{op.rstrip('_')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"op": op, **header, "cases": cases}, indent=1) + "\n")
        written.append(path.relative_to(_HERE) if path.is_relative_to(_HERE) else path)
    return written


def _rounded(value: Any) -> Any:
    """Floats to four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _machine(device: dict[str, Any]) -> str:
    """A record's device on one line."""
    if "capability" not in device:
        return (
            f"{device['model']}, {device['cores']} cores ({', '.join(device['isa'])}), {device['threads']} threads; "
            f"torch {device['torch']}, Python {device['python']}"
        )
    clocks = ", ".join(f"{name} {value}" for name, value in device["clocks"].items())
    return (
        f"{device['model']}, {device['multiprocessors']} multiprocessors, {device['memory_gib']} GiB, "
        f"L2 {device['l2_mib']} MiB, driver {device['driver'] or 'unknown'}{clocks and f', clocks: {clocks}'}; "
        f"torch {device['torch']}, CUDA {device['cuda']}, Triton {device['triton']}, Python {device['python']}"
    )


def _section(record: dict[str, Any], name: str) -> list[str]:
    """Markdown of one operation."""
    changed = " with changes" if record["modified"] else ""
    peers = ", ".join(f"{package} {found or 'not installed'}" for package, found in record["packages"].items())
    lines = [
        f"## {record['op']}",
        "",
        f"{record['date']}, commit {(record['commit'] or 'unknown')[:12]}{changed}; {_machine(record['device'])}. "
        f"Peers: {peers or 'torch'}. [Record]({name}).",
        "",
    ]
    for case in record["cases"]:
        columns = _columns(case)
        lines += [f"### {_title(case)}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [
            f"| {' | '.join(cell.replace('|', '/') for cell in _cells(row, case['unit'], columns))} |"
            for row in case["rows"]
        ]
        lines.append("")
    return lines


def load_records(folder: Path = RECORDS) -> dict[Path, dict[str, Any]]:
    """All benchmark records under a folder; files without `cases` are skipped."""
    found = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))}
    return {path: record for path, record in found.items() if isinstance(record, dict) and "cases" in record}


def page(folder: Path = RECORDS) -> str:
    """RECORDS.md from all records, device by device."""
    lines = ["# Records", "", "Made by `python -m bench.records` from the files in `records/`.", ""]
    by_device: dict[str, dict[Path, dict[str, Any]]] = {}
    for path, record in load_records(folder).items():
        by_device.setdefault(path.parent.name, {})[path] = record
    for device, records in by_device.items():
        if len(by_device) > 1:
            lines += [f"# {device}", ""]
        for protocol in dict.fromkeys(record["protocol"] for record in records.values()):
            lines += [protocol, ""]
        for path, record in records.items():
            lines += _section(record, path.relative_to(folder.parent).as_posix())
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    _PAGE.write_text(page())
    print(f"wrote {_PAGE.name}")
