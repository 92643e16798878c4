"""Renamed options: the new names of old flags, and upgrades of earlier runs' configurations."""

from __future__ import annotations

from typing import Any

from mgrpo.config.option import flag

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


def new_flag(given: str, renamed: dict[str, str]) -> str | None:
    """The present flag for one of an earlier release, None for others.

    Args:
        given: a flag, spelled with `-` or `_`, of a switch also the one that turns it off.
        renamed: old and new names, dotted, with `_`.
    """
    return {flag(old): flag(new) for old, new in renamed.items()}.get(given.replace("_", "-").replace(".no-", "."))


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
