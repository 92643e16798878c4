"""Writes the tables of docs/cli.md from the fields of the option groups: `python -m bench.cli`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any

from mgrpo.config import Config, flag

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
MARK = "<!-- the rest is written by python -m bench.cli -->"


def docstrings(group: type) -> dict[str, str]:
    """The docstring of each field of a group, on one line."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(group)).body if isinstance(node, ast.ClassDef))
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(body, [*body[1:], None], strict=True)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def values(hint: Any) -> str:
    """Text for the values of an option."""
    if typing.get_origin(hint) is typing.Annotated:
        return values(typing.get_args(hint)[0])
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if typing.get_origin(hint) is tuple:
        return f"{values(arguments[0])} ..."
    if arguments:
        return " or ".join(values(argument) for argument in arguments if argument is not type(None))
    return {str: "text", int: "integer", float: "number", bool: "switch", Path: "path"}[hint]


def table(name: str, group: type) -> list[str]:
    """Heading, description and table of one group."""
    texts, hints, prefix = (
        docstrings(group),
        typing.get_type_hints(group, include_extras=True),
        f"{name}." if name else "",
    )
    rows = [f"## {flag(prefix)[:-1] + '.*' if name else 'The run'}", "", inspect.getdoc(group) or "", ""]
    rows += ["| flag | value | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(group):
        if field.name not in texts or field.name == "preset":
            continue
        default = field.default if isinstance(field.default, str) else repr(field.default)
        allowed = values(hints[field.name])
        if allowed == "switch":
            allowed += f", off by `{flag(f'{prefix}no_{field.name}')}`"
        cells = [f"`{flag(prefix + field.name)}`", allowed, f"`{default}`", texts[field.name]]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*rows, ""]


def make_page(page: str) -> str:
    """The page with new tables."""
    hints = typing.get_type_hints(Config)
    groups = {field.name: hints[field.name] for field in dataclasses.fields(Config)}
    groups = {"": Config} | {name: hint for name, hint in groups.items() if dataclasses.is_dataclass(hint)}
    rows = [row for name, group in groups.items() for row in table(name, group)]
    return page.partition(MARK)[0] + MARK + "\n\n" + "\n".join(rows)


if __name__ == "__main__":
    PAGE.write_text(make_page(PAGE.read_text()))
