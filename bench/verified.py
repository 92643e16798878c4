"""Lists the backends that "auto" may take on a GPU, from records of passed tests: `python -m bench.verified`.

Reads records/*/verification.json, which `pytest -m gpu --verify-record DIR` writes, and the times beside them; writes
mgrpo_kernels/verified.json and the part of docs/kernels.md between its marks. `--records DIR` adds a folder of records,
as `make gpu` does with its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgrpo_kernels._sources import hash_cpp
from mgrpo_kernels.operations import OPERATIONS, source_hash
from mgrpo_kernels.verified import FILE

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
MARKS = ("<!-- support: python -m bench.verified -->\n", "<!-- support ends -->\n")
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int64": "int64"}


def read(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """All verification results below the folders, each with its machine; the newest last."""
    paths = sorted(path for folder in folders for path in folder.rglob("verification.json"))
    found = []
    for path in paths:
        record = json.loads(path.read_text())
        found += [result | {"machine": record["machine"], "folder": path.parent} for result in record["results"]]
    return sorted(found, key=lambda result: result["machine"]["date"])


def _ms(result: dict[str, Any]) -> float:
    """The least time recorded for the operation and backend of a verification; inf if there is none."""
    path = result["folder"] / f"{result['op'].rstrip('_')}.json"
    cases = json.loads(path.read_text()).get("cases", []) if path.is_file() else []
    times = [
        row["ms"] for case in cases for row in case["rows"] if row.get("backend") == result["backend"] and row["ms"]
    ]
    return min(times, default=float("inf"))


def current_hash(op: str, backend: str) -> str:
    """Hash of the sources in this checkout, not of the compiled library."""
    return source_hash(op, backend, {path.stem: hash_cpp(path) for path in (ROOT / "csrc" / "cuda").glob("*.cu")})


def verified_runs(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Entries of verified.json: backends that passed all tests on a GPU with these sources, the fastest first."""
    passed = [result for result in results if result["machine"]["capability"] and not result["failed"]]
    passed = [result for result in passed if result["sources"] == current_hash(result["op"], result["backend"])]
    order = list(OPERATIONS)
    passed.sort(key=lambda result: (order.index(result["op"]), _ms(result)))
    return [
        {"op": result["op"], "backend": result["backend"], "dtype": dtype}
        | {name: result[name] for name in ("sources",)}
        | {name: result["machine"][name] for name in ("capability", "device", "torch", "triton")}
        for result in passed
        for dtype in result["dtypes"]
    ]


def _cell(results: Sequence[dict[str, Any]], op: str, backend: str) -> str:
    """Cell of the table: dtypes that passed in the newest record, and its device."""
    found = [result for result in results if result["op"] == op and result["backend"] == backend]
    if not found:
        return "no GPU run"
    newest = found[-1]
    if newest["failed"]:
        return f"fails on {newest['machine']['device']}"
    dtypes = ", ".join(_SHORT[name] for name in _SHORT if name in newest["dtypes"])
    return dtypes if backend == "cpu" else f"{dtypes}: {newest['machine']['device']}"


def table(results: Sequence[dict[str, Any]]) -> str:
    """The table of support in docs/kernels.md."""
    lines = ["| operation | `cpu` | `cuda` | `triton` |", "|---|---|---|---|"]
    for op in OPERATIONS:
        cells = (_cell(results, op, backend) for backend in ("cpu", "cuda", "triton"))
        lines.append(f"| `{op}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, action="append", default=[], help="another folder of records")
    results = read([ROOT / "bench" / "records", *parser.parse_args().records])
    runs = verified_runs(results)
    FILE.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    before, rest = PAGE.read_text().split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + table(results) + MARKS[1] + rest.split(MARKS[1])[1])
    print(f"{FILE.name}: {len(runs)} verified; docs/kernels.md: table of support")
    print(table(results))


if __name__ == "__main__":
    main()
