"""Renamed options: errors for their old flags, and upgrades of earlier runs' configurations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mgrpo.config.option import flag
from mgrpo.errors import ConfigError

# Old dotted name: new one.
RENAMED = {
    **{f"rollout.{name}": f"rollout.num_{name}" for name in ("prompts", "policy", "momentum")},
    "rollout.engine": "engine.name",
    **{
        f"rollout.{name}": f"engine.{name}"
        for name in (
            *("placement", "servers", "devices", "weights_host", "transfer", "timeout_s", "sleep", "gpu_memory"),
            *("kv_cache_gib", "batch_size"),
        )
    },
}


def refuse_renamed(arguments: Sequence[str], renamed: dict[str, str], command: str) -> None:
    """Raises ConfigError for renamed flags.

    Args:
        arguments: of a command line.
        renamed: old and new names, dotted, with `_`.
        command: prefix of the message.
    """
    given = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    old = {flag(name): flag(new) for name, new in renamed.items()}
    problems = [
        f"{command}: {name} is now {old[spelled]}."
        for name in dict.fromkeys(given)
        if (spelled := name.replace("_", "-").replace(".no-", ".")) in old
    ]
    if problems:
        raise ConfigError(problems)


def upgrade(data: Any) -> Any:
    """The configuration of a run of an earlier release, with current names and defaults."""
    if not isinstance(data, dict) or not isinstance(data.get("rollout"), dict):
        return data
    groups = {name: dict(group) if isinstance(group, dict) else group for name, group in data.items()}
    groups["rollout"].setdefault("stop", [])  # runs from before this option have none
    for old, new in RENAMED.items():
        group, name = old.split(".")
        target, new_name = new.split(".")
        if name in groups[group]:
            groups.setdefault(target, {})[new_name] = groups[group].pop(name)
    return groups
