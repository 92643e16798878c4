"""docs/cli.md says what --help says."""

from __future__ import annotations

import re

import pytest

from bench.cli import PAGE, make_page
from mgrpo.evaluate import main as evaluate
from mgrpo.train import main as train

GROUPS = ("model", "data", "answer", "rollout", "engine")


def flags_of_help(command, capsys) -> set[str]:
    """Flags that `--help` lists, of a switch the one that turns it on."""
    with pytest.raises(SystemExit) as end:
        command(["--help"])
    assert end.value.code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    return {line.split()[0].rstrip(",") for line in re.findall(r"^[│ ] (--[a-z].*)", plain, re.M)}


def flags_of_page(text: str) -> set[str]:
    """Flags in the first column of the tables."""
    return set(re.findall(r"^\| `(--[^`]*)`", text, re.M))


def test_the_tables_are_those_of_the_code():
    assert make_page(PAGE.read_text()) == PAGE.read_text(), "python -m bench.cli writes them anew"


def test_the_page_has_every_flag_and_no_other(capsys):
    written, tables = PAGE.read_text().split("## The run")
    trained = flags_of_help(train, capsys)
    assert len(trained) > 90 and trained == flags_of_page(tables)
    groups = {name for name in trained if name.startswith(tuple(f"--{g}." for g in GROUPS))}
    assert flags_of_help(evaluate, capsys) == flags_of_page(written) | groups
