"""Output that can not be written: it is lost, and the run, its exit code and its files are not."""

from __future__ import annotations

import errno
import io
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.table import Table

import mgrpo
from mgrpo.evaluate import main as evaluate_main
from mgrpo.process.disk import list_checkpoints, step_of
from mgrpo.process.display import make_console
from mgrpo.process.output import Display, protect_output
from mgrpo.report import main as report_main

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(mgrpo.__file__).parents[1]), "OMP_NUM_THREADS": "1"}

# Prints in every way there is, to its end, and leaves a file and an exit code of its own.
CHATTER = """
import logging, os, subprocess, sys, warnings
handler = logging.StreamHandler()  # holds the stream as it was, as libraries do
from mgrpo.process.output import protect_output
protect_output()
file = open(sys.argv[1], "w")
from rich.console import Console
from rich.progress import track
from rich.table import Table
logging.getLogger().addHandler(handler)
table = Table("caf\\xe9 \\u4e2d\\ud800")
for i in track(range(3)):
    print("line \\u4e2d\\ud800", i, flush=i == 1)
    print("error \\u4e2d", file=sys.stderr)
    Console().print(table)
    warnings.warn(f"warning {i}")
    logging.warning("logged \\u4e2d")
    subprocess.run(["sh", "-c", "echo child; echo child >&2"], check=False)
    sys.stdout.writelines(["a" * 999 + "\\n"] * 40)
print("left in the buffer", end="")
file.write("whole")
file.close()
sys.exit(3)
"""


def shell(redirect: str, path: Path, environment=None) -> int:
    """Exit code of the chatter behind a shell's redirection."""
    command = f'exec "{sys.executable}" -c "$CHATTER" "{path}" {redirect}'
    done = subprocess.run(["bash", "-c", command], env=ENVIRONMENT | {"CHATTER": CHATTER} | (environment or {}))
    return done.returncode


@pytest.mark.fault("output that can not be written: full disk, closed descriptors, no letters for it")
@pytest.mark.parametrize(
    "redirect",
    [
        ">/dev/full",
        "2>/dev/full >/dev/null",
        "&>/dev/full",
        ">&- 2>/dev/null",
        "2>&- >/dev/null",
        "<&- >&- 2>&-",
        "&>/dev/null",
    ],
)
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_streams_that_fail_cost_neither_exit_code_nor_files(tmp_path, redirect, encoding):
    assert shell(redirect, tmp_path / "file", {"PYTHONIOENCODING": encoding}) == 3
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.fault("output whose reader is gone: a closed pipe, a terminal that hung up")
@pytest.mark.parametrize("where", ["stdout", "stderr", "both"])
@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_reader_that_is_gone(tmp_path, where, kind):
    read, write = os.pipe() if kind == "pipe" else pty.openpty()
    streams = {name: write if where in (name, "both") else subprocess.DEVNULL for name in ("stdout", "stderr")}
    process = subprocess.Popen([sys.executable, "-c", CHATTER, str(tmp_path / "file")], env=ENVIRONMENT, **streams)
    os.close(write)
    os.read(read, 10)
    os.close(read)
    assert process.wait(60) == 3
    assert (tmp_path / "file").read_text() == "whole"


def test_what_can_be_written_is(tmp_path):
    """Letters that the encoding has not are spelled out, the others stay."""
    out = tmp_path / "out"
    assert shell(f'>"{out}" 2>/dev/null', tmp_path / "file", {"PYTHONIOENCODING": "ascii"}) == 3
    text = out.read_text("ascii")
    assert "line \\u4e2d\\ud800 2" in text and "caf\\xe9" in text and text.count("child\n") == 3
    assert text.endswith("left in the buffer")


class Broken(io.StringIO):
    """Raises `error`, while it has one."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        if self.error:
            raise self.error
        return super().write(text)

    def flush(self):
        self.write("")


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EIO, ""), OSError(errno.ENOSPC, ""), ValueError()])
def test_no_error_of_a_stream_leaves_it(error):
    display = Display(Broken(error))
    assert display.write("five.") == 5 and display.flush() is None and display.writelines(["a"]) is None
    assert display.readable() and not display.closed and not display.isatty()


def test_a_disk_that_was_full_shows_again():
    stream = Broken(OSError(errno.ENOSPC, ""))
    display = Display(stream)
    display.write("lost")
    stream.error = None
    display.write("shown")
    assert stream.getvalue() == "shown"


def test_output_is_protected_once(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    protect_output()
    first = sys.stdout, sys.stderr
    protect_output()
    assert (sys.stdout, sys.stderr) == first
    print("a")
    print("b", file=sys.stderr)
    assert sys.stdout.getvalue() == "a\n"


def test_evaluation_and_report_end_with_their_own_exit_code(launch, tmp_path, monkeypatch):
    assert launch({"steps": 1}) == 0
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Broken(BrokenPipeError()))
    data = ["--data.probe", "arithmetic:4:2-2:1", "--samples", "1", "--answer.extract", "last-number"]
    assert evaluate_main([*data, "--out", str(tmp_path / "out.json")]) == 0 and (tmp_path / "out.json").is_file()
    assert evaluate_main([*data, "--samples", "0"]) == 2
    monkeypatch.setattr("mgrpo.report.write_report", lambda runs, out: tmp_path / "report.html")
    assert report_main([str(tmp_path / "run")]) == 0
    assert launch({"steps": 2, "data.train": "nowhere.jsonl"}, run_dir=tmp_path / "other") == 2
    assert launch({"steps": 2}, run_dir=tmp_path / "third") == 0
    assert [step_of(folder) for folder in list_checkpoints(tmp_path / "third")] == [2]


@pytest.mark.slow
@pytest.mark.fault("a reader that leaves, to a whole run")
@pytest.mark.parametrize("environment", [{}, {"PYTHONIOENCODING": "ascii", "LANG": "C"}])
def test_a_run_whose_reader_leaves_goes_on_to_its_end(command_line, tmp_path, rows_of, environment):
    flags = command_line(tmp_path / "run", {"steps": 4, "eval.every": 2, "log.samples": 1})
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "mgrpo.train", *flags], env=ENVIRONMENT | environment, stdout=write, stderr=write
    )
    os.close(write)
    os.read(read, 10)
    os.close(read)
    assert process.wait(120) == 0
    assert [step_of(folder) for folder in list_checkpoints(tmp_path / "run")] == [4]
    assert len(rows_of(tmp_path / "run")) == 4 and (tmp_path / "run" / "report.html").is_file()


def test_a_pipe_that_is_full_for_a_while_holds_nothing_up(tmp_path):
    """Its writer does not wait: what does not fit is lost."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    command = [sys.executable, "-c", CHATTER, str(tmp_path / "file")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=write, stderr=subprocess.DEVNULL)
    os.close(write)
    time.sleep(0.1)
    assert process.wait(60) == 3
    os.close(read)


def test_a_path_is_whole_where_the_output_is_no_terminal(capsys, monkeypatch):
    path = "/".join(["folder"] * 40)
    table = Table("what", "found", title=f"{path} title")
    table.add_row("free", path)
    monkeypatch.setenv("COLUMNS", "40")
    make_console().print(table)
    make_console(stderr=True).print(f"run  ->  {path}")
    captured = capsys.readouterr()
    assert captured.out.count(path) == 2 and captured.err == f"run  ->  {path}\n"


def test_every_console_is_made_in_one_place():
    made = [path.name for path in Path(mgrpo.__file__).parent.rglob("*.py") if " Console(" in path.read_text()]
    assert made == ["display.py"]
