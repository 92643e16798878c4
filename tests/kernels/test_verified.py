from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mgrpo_kernels
from bench.verified import MARKS, current_hash, read, table, verified_runs
from mgrpo_kernels import _sources, verified
from mgrpo_kernels._common import native
from mgrpo_kernels.backends import Availability, resolve
from mgrpo_kernels.operations import OPERATIONS, source_hash
from mgrpo_kernels.verified import Run, find

ROOT = Path(__file__).parents[2]

CUDA = torch.device("cuda", 0)
FP32, BF16 = torch.float32, torch.bfloat16
PYTHON = '''
"""What it is."""
def f(x):  # why
    """Doc."""
    # more
    return "# no comment" + f"{x}#"

'''
CPP = """
// what
#include "near.h"
int f() { return 'a' + "// no comment"[0]; /* why
  more */ }
"""


def test_comments_docstrings_and_blank_lines_do_not_count_in_python():
    bare = 'def f(x):\n    return "# no comment" + f"{x}#"'
    assert _sources.strip_python(PYTHON) == bare
    assert _sources.strip_python(PYTHON.replace("no comment", "other")) != bare


def test_comments_do_not_count_in_cpp_and_headers_do(tmp_path):
    source, header = tmp_path / "a.cu", tmp_path / "near.h"
    source.write_text(CPP)
    header.write_text("int g();")
    first = _sources.hash_cpp(source)
    source.write_text(CPP.replace("what", "something else").replace("more */", "*/"))
    header.write_text("int g();  // why\n")
    assert _sources.hash_cpp(source) == first
    header.write_text("int h();")
    assert _sources.hash_cpp(source) != first
    header.write_text("int g();")
    source.write_text(CPP.replace("'a'", "'b'"))
    assert _sources.hash_cpp(source) != first


def test_a_hash_covers_what_is_imported(tmp_path, monkeypatch):
    package = tmp_path / "mgrpo_kernels"
    (package / "op").mkdir(parents=True)
    monkeypatch.setattr(_sources, "_PACKAGE", package)
    (package / "op" / "triton.py").write_text("from mgrpo_kernels.op import deep\nfrom mgrpo_kernels import ops\n")
    hashes = []
    for deep, ops in (("x = 1", "y = 1"), ("x = 1  # why", "y = 2"), ("x = 2", "y = 2")):
        (package / "op" / "deep.py").write_text(deep)
        (package / "ops.py").write_text(ops)
        _sources.hash_python.cache_clear()
        hashes.append(_sources.hash_python("op/triton.py", "op/absent.py"))
    _sources.hash_python.cache_clear()
    assert hashes[0] == hashes[1] != hashes[2]


def test_every_operation_has_folders_of_kernels():
    operations = {name for name in mgrpo_kernels.__all__ if name[0].islower()} - {"backends"}
    assert set(OPERATIONS) == operations
    found = {folder for operation in OPERATIONS.values() for folder in operation.folders}
    assert found == {path.parent.name for path in (ROOT / "mgrpo_kernels").glob("[a-z]*/triton.py")}
    assert current_hash("linear_grpo_loss", "triton") != current_hash("grpo_loss", "triton")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc, without which the CUDA library is not built")
def test_the_library_knows_the_sources_it_was_made_of():
    assert native.CUDA[0], native.CUDA[1]
    expected = {path.stem: _sources.hash_cpp(path) for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert native.sources() == expected, "the library is older than its sources: make"
    assert all(source_hash(op, "cuda", native.sources()).count("-") >= 1 for op in OPERATIONS)
    assert all(source_hash(op, "cuda", native.sources()) == current_hash(op, "cuda") for op in OPERATIONS)


def test_a_library_that_is_not_here_has_no_hash():
    assert source_hash("token_logprob", "cuda", {}) == ""


def make_run(op: str, backend: str, dtype: str, **changes: str) -> Run:
    run = Run(
        op, backend, dtype, "9.0", current_hash(op, backend), "a card", torch.__version__, verified.triton_version()
    )
    return run._replace(**changes)


@pytest.fixture
def with_runs(monkeypatch):
    """Replaces what is verified, and gives this machine a card of capability 9.0 and both GPU backends."""

    def use(*runs: Run, capability: tuple[int, int] = (9, 0)) -> None:
        verified._choose.cache_clear()
        monkeypatch.setattr(verified, "runs", lambda: runs)
        monkeypatch.setattr(verified, "_capability", lambda index: capability)
        monkeypatch.setattr(sys.modules["mgrpo_kernels.backends"], "_state", lambda name: Availability(True, ""))
        monkeypatch.delenv("MGRPO_BACKEND", raising=False)

    yield use
    verified._choose.cache_clear()


def test_a_run_counts_for_its_dtypes_and_major_architecture():
    run = make_run("token_logprob", "triton", "float32")
    assert find_in(run, "token_logprob", (FP32,), (9, 0)) == ["triton"]
    assert find_in(run, "token_logprob", (FP32,), (9, 1)) == ["triton"]
    assert find_in(run, "token_logprob", (), (9, 0)) == ["triton"]
    for op, dtypes, capability in (
        ("grpo_loss", (FP32,), (9, 0)),
        ("token_logprob", (BF16,), (9, 0)),
        ("token_logprob", (FP32, BF16), (9, 0)),
        ("token_logprob", (FP32,), (8, 0)),
    ):
        assert find_in(run, op, dtypes, capability) == []


def test_a_call_reads_the_table_and_hashes_no_source(with_runs):
    with_runs(make_run("token_logprob", "triton", "float32", sources="another"))
    assert resolve("token_logprob", CUDA, "auto", (FP32,)) == "triton"
    script = "import sys, mgrpo_kernels; print('mgrpo_kernels._sources' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_row_of_the_shipped_table_is_stale():
    stale = [run for run in verified.runs() if run.sources != current_hash(run.op, run.backend)]
    assert not stale, "run python -m bench.verified, or `make gpu` for rows of these sources"


def find_in(run: Run, *args) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verified, "runs", lambda: (run,))
        return [found.backend for found in find(*args)]


def test_auto_takes_the_first_verified_backend_of_the_list(with_runs):
    both = [make_run("token_logprob", backend, "float32") for backend in ("triton", "cuda")]
    with_runs(*both)
    assert resolve("token_logprob", CUDA, "auto", (FP32,)) == "triton"
    with_runs(*reversed(both))
    assert resolve("token_logprob", CUDA, "auto", (FP32,)) == "cuda"


def test_auto_without_a_verified_kernel_is_the_reference_and_says_so_once(with_runs, caplog):
    with_runs()
    with caplog.at_level(logging.WARNING, "mgrpo_kernels"):
        for _ in range(2):
            assert resolve("iqr_filter", CUDA, "auto", (FP32,)) == "reference"
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith("iqr_filter runs on plain PyTorch: no kernel of this source has passed")
    assert "capability 9.0 for float32" in text and "triton forces one" in text


def test_another_version_than_the_verified_is_taken_with_a_notice(with_runs, caplog):
    with_runs(make_run("grpo_loss", "triton", "float32", torch="2.0.0"), capability=(9, 1))
    with caplog.at_level(logging.INFO, "mgrpo_kernels"):
        assert resolve("grpo_loss", CUDA, "auto", (FP32,)) == "triton"
    text = next(record.getMessage() for record in caplog.records if "passed its tests" in record.getMessage())
    assert "a card (capability 9.0, torch 2.0.0" in text and "here are 9.1" in text


def test_a_named_backend_needs_no_verification(with_runs, monkeypatch):
    with_runs()
    assert resolve("token_logprob", CUDA, "triton", (FP32,)) == "triton"
    monkeypatch.setenv("MGRPO_BACKEND", "triton")
    assert resolve("token_logprob", CUDA, "auto", (FP32,)) == "triton"


def test_the_choice_is_a_constant_of_a_compiled_graph(with_runs):
    with_runs(make_run("token_logprob", "triton", "float32"))

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * (2 if verified.choose("token_logprob", 0, (FP32,), ("cuda", "triton")) == "triton" else 3)

    assert torch.equal(torch.compile(scaled, fullgraph=True, backend="eager")(torch.ones(2)), torch.full((2,), 2.0))


def test_the_shipped_files_are_those_of_the_records():
    results = read([ROOT / "bench" / "records"])
    shipped = json.loads(verified.FILE.read_text())["runs"]
    assert shipped == verified_runs(results), "run python -m bench.verified"
    inside = (ROOT / "docs" / "kernels.md").read_text().split(MARKS[0])[1].split(MARKS[1])[0]
    assert inside == table(results), "run python -m bench.verified"
    assert [Run(**entry) for entry in shipped] == list(verified.runs())


def record(folder: Path, **changes) -> Path:
    machine = {"device": "a card", "capability": "9.0", "torch": "2", "triton": "3", "date": "2026-01-02"}
    result = {"op": "grpo_loss", "dtypes": ["float32"], "tests": 3, "failed": []}
    results = [
        result | {"backend": backend, "sources": current_hash("grpo_loss", backend)} for backend in ("triton", "cuda")
    ]
    folder.mkdir(parents=True)
    content = {"machine": machine, "results": [results[0], results[1] | changes]}
    (folder / "verification.json").write_text(json.dumps(content))
    rows = [{"backend": "triton", "ms": 2.0}, {"backend": "cuda", "ms": 1.0}, {"backend": None, "ms": 0.5}]
    (folder / "grpo_loss.json").write_text(json.dumps({"op": "grpo_loss", "cases": [{"rows": rows}]}))
    return folder


def test_the_fastest_comes_first_and_a_failure_verifies_nothing(tmp_path):
    runs = verified_runs(read([record(tmp_path / "good")]))
    assert [run["backend"] for run in runs] == ["cuda", "triton"]
    failing = read([record(tmp_path / "bad", failed=["test_x"])])
    assert [run["backend"] for run in verified_runs(failing)] == ["triton"]
    assert "| `grpo_loss` | no GPU run | fails on a card | fp32: a card |" in table(failing)


def test_other_sources_than_those_here_verify_nothing(tmp_path):
    assert [run["backend"] for run in verified_runs(read([record(tmp_path / "old", sources="abc")]))] == ["triton"]


@pytest.mark.slow
def test_the_record_of_a_run_says_what_passed_and_what_failed(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize(('dtype', 'backend'), [('float32', 'cpu')])\n"
        "@pytest.mark.parametrize('op', ['grpo_loss', 'iqr_filter'])\n"
        "def test_it(op, dtype, backend):\n    assert op == 'grpo_loss'\n"
        "@pytest.mark.verifies('ema_update_')\n@pytest.mark.parametrize('backend', ['cpu'])\n"
        "def test_other(backend):\n    pass\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "conftest",
        f"--rootdir={ROOT}",
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    command += ["--verify-record", str(tmp_path / "out"), str(tmp_path / "test_x.py")]
    environment = {"PATH": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "verification.json").read_text())["results"]
    found = {result["op"]: (result["dtypes"], result["tests"], result["failed"]) for result in results}
    assert found == {
        "ema_update_": ([], 1, []),
        "grpo_loss": (["float32"], 1, []),
        "iqr_filter": ([], 0, ["test_it[iqr_filter-float32-cpu]"]),
    }
