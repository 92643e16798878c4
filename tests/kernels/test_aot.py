from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import aot

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """The report of every kernel, by a process in which Triton compiles."""
    folder = tmp_path_factory.mktemp("aot")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-m", "bench.aot", "--output", str(folder)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def rows(output) -> list[dict]:
    return json.loads((output / "triton.json").read_text())["rows"]


def kernels(text: str) -> set[tuple[str, str]]:
    """Names and architectures that a table lists."""
    return set(re.findall(r"^\| \**`(\w+)`\** \| (sm_\d+) \|", text, re.MULTILINE))


@pytest.mark.slow
def test_no_kernel_spills_uses_the_stack_or_loses_its_16_byte_accesses(rows):
    assert {row["op"] for row in rows} == set(aot.operations())
    bad = {
        f"{row['kernel']} {row['architecture']} {row['constants']}": aot.wrong(row) for row in rows if aot.wrong(row)
    }
    assert not bad


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["token_logprob_fwd_kernel", "token_logprob_bwd_kernel"])
def test_every_dtype_of_logits_has_its_own_expectation(rows, kernel):
    sizes = {"*fp32": 4, "*bf16": 2, "*fp16": 2}
    bound = [row for row in rows if row["kernel"] == kernel]
    assert {row["arguments"].split()[0] for row in bound} == set(sizes)
    for row in bound:
        logits, output = row["arguments"].split()[:2]
        # A thread has 32 logits of a block, and asks for two blocks while it computes a third.
        assert row["reads"] == 2 * 32 * sizes[logits]
        assert row["writes"] == (32 * sizes[output] if kernel == "token_logprob_bwd_kernel" else 0)


@pytest.mark.slow
def test_the_report_lists_exactly_the_kernels(rows, output):
    expected = {(row["kernel"], row["architecture"]) for row in rows}
    assert kernels((output / "AOT.md").read_text()) == expected
    assert kernels((aot.BENCH / "AOT.md").read_text()) == expected, "run python -m bench.aot"


@pytest.mark.slow
def test_every_public_kernel_is_among_the_variants(rows):
    """A kernel by its name that no launcher's variant compiles would be looked at by nobody."""
    sources = "\n".join(path.read_text() for path in aot.PACKAGE.glob("*/triton*.py"))
    assert {row["kernel"] for row in rows} == set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))


@pytest.mark.parametrize("spoiled", ["error", "spill_bytes", "stack_bytes", "loads_16", "stores_16", "under_way"])
def test_what_is_wrong_is_found(spoiled):
    row = {"error": 0, "spill_bytes": 0, "stack_bytes": 0, "reads": 64, "writes": 32}
    row |= {"loads_16": 4, "stores_16": 2, "under_way": 24 * 1024}
    assert aot.wrong(row) == []
    assert aot.wrong(row | {spoiled: row[spoiled] - 1 if row[spoiled] else 8}) == [spoiled]
    assert aot.wrong(row | {"loads_16": 0, "stores_16": 0, "under_way": 0, "reads": 0, "writes": 0}) == []
