"""Configurations as JSON data, and back."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal

from mgrpo.config.renamed import RENAMED
from mgrpo.config.run import Config
from mgrpo.errors import ConfigError


def to_dict(config: Config) -> dict[str, Any]:
    """Turns a configuration into JSON-able data."""
    return dataclasses.asdict(config)


def from_dict(data: dict[str, Any]) -> Config:
    """Builds a configuration from `to_dict` data; an unknown key fails and names the nearest one."""
    return _build(Config, data, "")


def _build(cls: Any, data: Any, where: str) -> Any:
    """Builds one dataclass, recursively."""
    if not isinstance(data, dict):
        raise ConfigError([f"config: {where.rstrip('.') or 'the file'} must be an object, got {data!r}."])
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f" Did you mean {where}{near[0]}?" if near else ""
            if new := RENAMED.get(where + key):
                hint = f" It is {new} now."
            raise ConfigError([f"config: {where}{key} is not a known key.{hint}"])
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, f"{where}{key}.")
        else:
            values[key] = _coerce(hints[key], value, where + key)
    return cls(**values)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Checks one value against its type; JSON lists become tuples and whole numbers floats."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal and value in options:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_coerce(options[0], item, where) for item in value)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        kinds = [option for option in options if option is not type(None)]
        literal = any(typing.get_origin(kind) is Literal and value in typing.get_args(kind) for kind in kinds)
        return value if literal else _coerce(kinds[0], value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    expected = " | ".join(map(str, options)) if options else getattr(hint, "__name__", hint)
    raise ConfigError([f"config: {where} must be {expected}, got {value!r}."])
