from __future__ import annotations

import sys
import time

import pytest

from bench.gpu import command as gpu
from bench.gpu.command import Stage, main, run, run_all, stages, summary


def python(code: str, name: str = "stage", limit_s: float = 30, **options) -> Stage:
    return Stage(name=name, command=[sys.executable, "-c", code], limit_s=limit_s, **options)


@pytest.mark.parametrize(
    ("code", "state", "detail"),
    [
        ("print('one'); print('two')", "ok", "two"),
        ("print('bad'); raise SystemExit(3)", "FAILED", "exit 3: bad"),
        ("print('no counters'); raise SystemExit(77)", "skipped", "no counters"),
    ],
)
def test_a_stage_tells_its_last_line(tmp_path, code, state, detail):
    outcome = run(python(code), tmp_path / "log", 30)
    assert (outcome.state, outcome.detail) == (state, detail)


def test_a_stage_and_its_children_end_at_the_limit(tmp_path):
    mark = tmp_path / "late"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    outcome = run(python(code), tmp_path / "log", 1)
    assert outcome.state == "FAILED" and outcome.detail == "stopped at its limit of 1 s"
    time.sleep(3)  # by now the child would have written, had it begun; one that a busy machine delays proves nothing
    assert not mark.exists()


def test_a_failure_does_not_stop_the_others_and_what_cannot_run_is_named(tmp_path, capsys):
    todo = [
        python("raise SystemExit(1)", "bad"),
        python("print('fine')", "good"),
        python("", "absent", needs=("no_such_module",)),
        python("", "card", gpu_only=True),
    ]
    outcomes = run_all(todo, tmp_path, "cpu", 60)
    assert [o.state for o in outcomes] == ["FAILED", "ok", "skipped", "skipped"]
    assert [o.detail for o in outcomes[2:]] == ["not installed: no_such_module", "needs a GPU"]
    (late,) = run_all(todo[1:2], tmp_path, "cpu", 1)
    assert (late.state, late.detail) == ("skipped", "1 s are left")
    text = summary(outcomes, tmp_path)
    assert text.rstrip().splitlines()[-1] == "| card | skipped | 0 | needs a GPU |"


@pytest.mark.parametrize(("code", "expected"), [("print('x')", 0), ("raise SystemExit(2)", 1)])
def test_exit_code_and_summary(tmp_path, monkeypatch, capsys, code, expected):
    monkeypatch.setattr(gpu, "stages", lambda *args: [python(code, "only")])
    assert main(["--device", "cpu", "--out", str(tmp_path)]) == expected
    assert capsys.readouterr().out.endswith((tmp_path / "summary.md").read_text() + "\n")


def test_the_budget_cuts_a_stage_short(tmp_path, capsys):
    (outcome,) = run_all([python("import time; time.sleep(60)")], tmp_path, "cpu", gpu.LEAST_S + 0.5)
    assert outcome.state == "FAILED" and outcome.seconds <= gpu.LEAST_S + 0.5


def test_the_stages_of_a_gpu_and_where_their_records_go(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.harness.cuda.slug", lambda: "nvidia_h200")
    (tmp_path / "trl-1-py3-none-any.whl").touch()
    todo = stages(tmp_path / "out", "cuda", tmp_path)
    names = [stage.name for stage in todo]
    assert names == ["wheels", "build", "doctor", "tests", "kernels", "verified", "update step", "ncu", "training"]
    tests = next(stage for stage in todo if stage.name == "tests")
    assert "-m" in tests.command and "gpu" in tests.command
    assert tests.command[-1].endswith("records/nvidia_h200")


@pytest.mark.slow
def test_the_command_itself_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # Triton's interpreter would be timed too
    run = gpu.run
    monkeypatch.setattr(gpu, "run", lambda stage, log, limit_s: run(stage, log, 9 * limit_s))  # of a busy machine
    assert main(["--device", "cpu", "--out", str(tmp_path), "--only", "kernels", "update step", "ncu"]) == 0
    text = (tmp_path / "summary.md").read_text()
    assert "| kernels | ok |" in text and "| update step | ok |" in text and "| ncu | skipped |" in text
    assert (tmp_path / "records" / "cpu" / "group_advantage.json").is_file()
