"""Reads a command line into a dataclass of options and lists everything that is wrong with it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro

from mgrpo.config.option import flag, range_problem
from mgrpo.config.renamed import new_flag
from mgrpo.errors import ConfigError
from mgrpo.inputs import nearest

# A flag; a negative number is a value.
FLAG = re.compile(r"--?(?!(?:inf|infinity|nan)$)[a-z]|--$", re.IGNORECASE)
HELP = ("-h", "--help")
WORDS = {str: "text", int: "an integer", float: "a number", Path: "a path", bool: "a switch", types.NoneType: "None"}


T = TypeVar("T")


class _Option(typing.NamedTuple):
    """A field that the command line sets."""

    name: str  # dotted
    hint: Any
    field: dataclasses.Field[Any]


@dataclass
class CommandLine(Generic[T]):
    """What a command line says.

    Attributes:
        options: the options with every right value, and defaults for wrong ones; None if a required one is missing.
        problems: a message for each wrong, unknown or missing one.
    """

    options: T | None
    problems: list[str] = field(default_factory=list)

    def with_others(self, problems: Sequence[str]) -> list[str]:
        """All problems, together with those among `problems` that are about another option."""
        wrong = set(map(_subject, self.problems))
        return list(dict.fromkeys([*self.problems, *(p for p in problems if _subject(p) not in wrong)]))

    def require(self) -> T:
        """The options; raises ConfigError with all problems."""
        if self.problems or self.options is None:
            raise ConfigError(self.problems)
        return self.options


def read_command_line(
    kind: type[T],
    arguments: Sequence[str],
    *,
    command: str,
    prog: str,
    default: T | None = None,
    renamed: dict[str, str] | None = None,
    description: str | None = None,
) -> CommandLine[T]:
    """Reads flags and positional arguments; `--help` prints the help and ends the process.

    Args:
        kind: dataclass of the options, with dataclasses as groups.
        arguments: of the command line.
        command: prefix of the messages.
        prog: the command in the help.
        default: options that the flags change.
        renamed: old and new names, dotted, with `_`.
        description: text of the help, else the docstring of the dataclass.
    """
    for i, argument in enumerate(arguments):
        if argument in HELP or argument.startswith("--tyro-"):
            plain = (tyro.conf.HelptextFromCommentsOff,)
            tyro.cli(kind, args=arguments[i:], default=default, prog=prog, description=description, config=plain)
    reader = _Reader(list(_options_of(kind)), renamed or {})
    reader.read(arguments)
    required = [o for o in reader.options if default is None and _is_required(o.field)]
    missing = [option for option in required if option.name not in reader.tried]
    problems = [*reader.problems, *(f"{reader.name_of(option)} must be given, got none." for option in missing)]
    is_whole = all(option.name in reader.values for option in required)
    found = _fill(kind, default, reader.values) if is_whole else None
    return CommandLine(found, [f"{command}: {problem}" for problem in dict.fromkeys(problems)])


class _Reader:
    """Reads arguments into values by dotted name, and notes what is wrong with them."""

    def __init__(self, options: list[_Option], renamed: dict[str, str]):
        self.options, self.renamed = options, renamed
        self.positional = next((o for o in options if tyro.conf.Positional in typing.get_args(o.hint)), None)
        self.flags = {flag(option.name): option for option in options if option is not self.positional}
        self.switches = {_off(name): option for name, option in self.flags.items() if option.hint is bool}
        self.values: dict[str, Any] = {}
        self.tried: set[str] = set()
        self.problems: list[str] = []

    def name_of(self, option: _Option) -> str:
        """The name of an option in messages."""
        return option.name.upper() if option is self.positional else flag(option.name)

    def read(self, arguments: Sequence[str]) -> None:
        """Reads all arguments."""
        rest: list[str] = []  # words that belong to no flag
        for given, words in _split(arguments):
            name = given.replace("_", "-")
            option = self.flags.get(name) or self.switches.get(name)
            if new := new_flag(given, self.renamed):
                self.problems.append(f"{given} is now {new}.")
            elif option:
                count = _num_words(option.hint) if self.positional else len(words)
                rest += words[count:]
                self._take(option, name, words[:count])
            elif given:
                known = [*self.flags, *self.switches]
                self.problems.append(f"{given} is not a known option.{_hint(name, known)}")
                rest += words if self.positional else []
            else:
                rest += words
        if self.positional and rest:
            self._take(self.positional, self.name_of(self.positional), rest)
        elif rest:
            self.problems.append(f"a flag must begin with --, got {' '.join(rest)}.")

    def _take(self, option: _Option, name: str, words: list[str]) -> None:
        """Sets the value of an option, or notes why it cannot be set."""
        self.tried.add(option.name)
        try:
            self.values[option.name] = _convert(option, name, words)
        except ValueError as error:
            self.problems.append(str(error))


def _subject(problem: str) -> str:
    """The option that a message is about."""
    return problem.partition(" must ")[0].rpartition(" ")[2]


def _options_of(kind: Any, prefix: str = "") -> Iterator[_Option]:
    """Every option of a dataclass, nested groups included."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for entry in dataclasses.fields(kind):
        hint = hints[entry.name]
        if dataclasses.is_dataclass(hint):
            yield from _options_of(hint, f"{prefix}{entry.name}.")
        elif tyro.conf.Suppress not in typing.get_args(hint):
            yield _Option(prefix + entry.name, hint, entry)


def _split(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the words after it; words before the first flag come with an empty one."""
    name, words = "", []
    for argument in arguments:
        if FLAG.match(argument):
            yield name, words
            name, equals, value = argument.partition("=")
            words = [value] if equals else []
        else:
            words.append(argument)
    yield name, words


def _convert(option: _Option, name: str, words: list[str]) -> Any:
    """The value of an option; raises ValueError for words that are none."""
    given = " ".join(words)
    if option.hint is bool:
        if words:
            raise ValueError(f"{name} must have no value, got {given}.")
        return name == flag(option.name)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            value = tyro.cli(option.hint, args=["--", *words])
    except SystemExit:
        raise ValueError(f"{name} must be {describe(option.hint)}, got {given or 'no value'}.") from None
    if problem := range_problem(option.name, value, option.field):
        raise ValueError(problem)
    return value


def _num_words(hint: Any) -> int:
    """Most words of an option's value."""
    kinds = [hint, *typing.get_args(hint)]
    return 0 if hint is bool else 2**31 if any(typing.get_origin(kind) is tuple for kind in kinds) else 1


def _off(name: str) -> str:
    """The flag that turns a switch off."""
    group, dot, last = name.removeprefix("--").rpartition(".")
    return f"--{group}{dot}no-{last}"


def _hint(name: str, known: list[str]) -> str:
    """A question about the known flag that is meant: one of another group with this name, or the nearest."""
    same = next((flag for flag in known if flag.endswith("." + name.lstrip("-"))), None)
    near = same or nearest(name, known)
    return f" Did you mean {near}?" if near else ""


def _is_required(entry: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _fill(kind: Any, default: Any, values: dict[str, Any], prefix: str = "") -> Any:
    """The options with the values, by dotted name, in place of defaults."""
    default = kind() if default is None and not any(map(_is_required, dataclasses.fields(kind))) else default
    changes = {}
    for entry in dataclasses.fields(kind):
        group = getattr(default, entry.name, None)
        if dataclasses.is_dataclass(group):
            changes[entry.name] = _fill(type(group), group, values, f"{prefix}{entry.name}.")
        elif prefix + entry.name in values:
            changes[entry.name] = values[prefix + entry.name]
    return kind(**changes) if default is None else dataclasses.replace(default, **changes)


def describe(hint: Any) -> str:
    """The values that an option takes, for messages."""
    *others, last = dict.fromkeys(_kinds(hint))
    return f"{', '.join(others)} or {last}" if others else last


def _kinds(hint: Any) -> Iterator[str]:
    """A word for each kind of value."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        yield from _kinds(arguments[0])
    elif origin is Literal:
        yield from map(str, arguments)
    elif arguments:
        for argument in arguments:
            yield from _kinds(argument) if argument is not ... else ()
    else:
        yield WORDS[hint]
