"""Wrong command lines: every mistake is one plain line, and all are listed at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import tyro

from mgrpo import doctor, evaluate, export, report, train
from mgrpo.config import HomePath
from mgrpo.config.option import option
from mgrpo.errors import ConfigError
from mgrpo.process.command_line import describe, read_command_line

COMMANDS = {"config": train, "evaluate": evaluate, "export": export, "report": report, "doctor": doctor}


@dataclass(frozen=True, kw_only=True)
class Group:
    rate: float = option(0.5, above=0)
    names: tuple[Literal["a", "b"], ...] = ("a",)
    fast: bool = True
    k: int = 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """A few options."""

    count: int | Literal["auto"] | None = 3
    kind: Literal["x", "y"] = "x"
    folder: HomePath | None = None
    group: Group = field(default_factory=Group)


@dataclass(frozen=True, kw_only=True)
class Files:
    """Positional arguments and a required flag."""

    runs: tyro.conf.Positional[tuple[HomePath, ...]]
    out: HomePath
    whole: bool = False


def read(*arguments, kind=Options, **options):
    return read_command_line(kind, arguments, command="c", prog="p", **options)


def test_right_values_are_read(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = "--count auto --kind=y --folder ~/a --group.rate -1 --group.rate 1e-2 --group.names b a --group.no-fast"
    line = read(*given.split())
    assert line.problems == ["c: --group.rate must be in (0, inf), got -1.0."]
    line = read(*given.replace("--group.rate -1 ", "").split())
    group = Group(rate=0.01, names=("b", "a"), fast=False)
    assert line.require() == Options(count="auto", kind="y", folder=Path("/home/me/a"), group=group)
    assert read("--count", "None", "--group.names").require() == Options(count=None, group=Group(names=()))
    assert read("--group.rate=-inf").problems == read("--group.rate", "-inf").problems != []
    assert read("--folder=--odd").require().folder == Path("--odd")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--count many", "--count must be an integer, auto or None, got many."),
        ("--count", "--count must be an integer, auto or None, got no value."),
        ("--count 3 4", "--count must be an integer, auto or None, got 3 4."),
        ("--kind=z", "--kind must be x or y, got z."),
        ("--group.names a c", "--group.names must be a or b, got a c."),
        ("--group.rate fast", "--group.rate must be a number, got fast."),
        ("--group.rate nan", "--group.rate must be in (0, inf), got nan."),
        ("--group.fast true", "--group.fast must have no value, got true."),
        ("--folder", "--folder must be a path or None, got no value."),
        ("--foldr x", "--foldr is not a known option. Did you mean --folder?"),
        ("--rate 1", "--rate is not a known option. Did you mean --group.rate?"),
        ("--k 2", "--k is not a known option. Did you mean --group.k?"),
        ("--group.nofast", "--group.nofast is not a known option. Did you mean --group.no-fast?"),
        ("--zzzzzz 1", "--zzzzzz is not a known option."),
        ("-x", "-x is not a known option."),
        ("--old_rate 1", "--old_rate is now --group.rate."),
        ("word", "a flag must begin with --, got word."),
    ],
)
def test_a_mistake_is_one_line_and_stands_beside_others(arguments, problem):
    renamed = {"old_rate": "group.rate"}
    assert read(*arguments.split(), renamed=renamed).problems == [f"c: {problem}"]
    line = read(*arguments.split(), "--kind", "y", "--group.rate", "0", renamed=renamed)
    assert set(line.problems) >= {"c: --group.rate must be in (0, inf), got 0.0.", f"c: {problem}"}
    assert line.options is not None and line.options.kind == "y"
    with pytest.raises(ConfigError):
        line.require()


def test_positional_arguments_and_required_flags():
    assert read("a", "--out", "o", "b", "--whole", "c", kind=Files).require() == Files(
        runs=(Path("a"), Path("b"), Path("c")), out=Path("o"), whole=True
    )
    assert read(kind=Files).problems == ["c: RUNS must be given, got none.", "c: --out must be given, got none."]
    assert read("a", "--out", kind=Files).problems == ["c: --out must be a path, got no value."]
    assert read("--whol", "a", "--out", "o", kind=Files).problems == [
        "c: --whol is not a known option. Did you mean --whole?"
    ]


def test_values_are_described():
    assert describe(int) == "an integer" and describe(tuple[str, ...] | None) == "text or None"


def test_problems_of_one_option_are_told_once():
    line = read("--count", "x")
    found = ["data: --count must be at most 2, got 3.", "data: --kind must be y, got x."]
    assert line.with_others(found) == [*line.problems, found[1]]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_lists_its_mistakes_in_plain_lines(command, capsys):
    given = ["--mode.path", "x", "--out"] if command in ("export", "report") else ["--mode.path", "x", "--model.dtype"]
    assert COMMANDS[command].main([*given, "--trust-remote-cod"]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) >= 3
    assert all(line.startswith(f"{command}: ") for line in lines)
    assert sum("is not a known option." in line for line in lines) == 2
    assert sum(line.endswith("got no value.") for line in lines) == 1
