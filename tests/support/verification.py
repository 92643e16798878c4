"""The option `--verify-record DIR`: writes which operations passed, for bench/verified.py, to DIR/verification.json.

A test counts for the operation of its parameter `op`, or of its marker `verifies`, on its parameter `backend`. One
failure of an operation on a backend unmakes all its dtypes there.
"""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path

import pytest
import torch

from mgrpo_kernels._common.native import sources
from mgrpo_kernels.operations import source_hash
from mgrpo_kernels.verified import triton_version


class Recorder:
    """Collects the outcome of every test about an operation."""

    def __init__(self, folder: Path):
        self._path = folder / "verification.json"
        self._passed: dict[tuple[str, str], dict[str, int]] = {}
        self._failed: dict[tuple[str, str], list[str]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):
        report = yield
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        marker = item.get_closest_marker("verifies")
        op = params.get("op") or (marker.args[0] if marker else None)
        if op is None or "backend" not in params:
            return report
        key = (op, params["backend"])
        if report.failed:
            self._failed.setdefault(key, []).append(item.name)
        elif report.passed and call.when == "call":
            counts = self._passed.setdefault(key, {})
            dtype = str(params.get("dtype", "any")).removeprefix("torch.")
            counts[dtype] = counts.get(dtype, 0) + 1
        return report

    def pytest_sessionfinish(self):
        results = [
            {
                "op": op,
                "backend": backend,
                "dtypes": sorted(dtype for dtype in counts if dtype != "any"),
                "tests": sum(counts.values()),
                "failed": self._failed.get((op, backend), []),
                "sources": source_hash(op, backend, sources()) if torch.cuda.is_available() else "",
            }
            for (op, backend), counts in sorted(
                (self._passed | {key: {} for key in self._failed} | self._passed).items()
            )
        ]
        record = {"machine": describe_machine(), "results": results}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(record, indent=1) + "\n")


def describe_machine() -> dict[str, str]:
    """What a verification holds for."""
    facts = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
    }
    if not torch.cuda.is_available():
        return {"device": platform.machine(), "capability": "", "cuda": ""} | facts
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return {
        "device": torch.cuda.get_device_name(),
        "capability": capability,
        "cuda": str(torch.version.cuda),
    } | facts
