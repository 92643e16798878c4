"""Registers the plug-in with verl, and checks that every worker has registered the same one."""

from __future__ import annotations

import importlib
import logging
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mgrpo.integrations.versions import SUPPORTED, require

NAME = "mgrpo"
REGISTRIES = {"TRAINER_REGISTRY": "v1.trainer_base", "ADV_ESTIMATOR_REGISTRY": "core_algos"}  # each with its module
# Importing them registers what they define.
PARTS = ("advantage", "trainer")
logger = logging.getLogger(__name__)
_failure: str | None = None


def load() -> None:
    """Registers trainer and estimator with verl; prints a failure, which verl itself logs only at DEBUG.

    Raises:
        UnsupportedVersion: verl is missing or its version unsupported.
        ImportError: a package that verl's trainer needs is missing.
    """
    global _failure
    try:
        require("verl")
        for part in PARTS:
            importlib.import_module(f"mgrpo.integrations.verl.{part}")
    except Exception as error:
        _failure = f"{type(error).__name__}: {error}"
        # To stderr too, because verl sets up logging only after its plug-ins.
        traceback.print_exc(file=sys.stderr)
        message = f"mgrpo's plug-in for verl failed to load ({_failure}); it supports verl {SUPPORTED['verl']}."
        print(f"ERROR: {message}", file=sys.stderr, flush=True)
        logger.error(message)
        raise


def describe() -> dict[str, Any]:
    """State of the plug-in in this process: versions, failure and registered names."""
    modules = {registry: sys.modules.get(f"verl.trainer.ppo.{name}") for registry, name in REGISTRIES.items()}
    registered = [registry for registry, module in modules.items() if NAME in getattr(module, registry, ())]
    return {"mgrpo": _version("mgrpo"), "verl": _version("verl"), "failure": _failure, "registered": registered}


def _version(package: str) -> str | None:
    """Version of an installed package; a checkout on PYTHONPATH has none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_processes(found: list[dict[str, Any]]) -> None:
    """Raises RuntimeError if a process has not loaded the plug-in, or another version of it.

    Args:
        found: `describe()` of each worker.
    """
    own = describe()
    for rank, other in enumerate(found):
        missing = REGISTRIES.keys() - set(other["registered"])
        if other["failure"] or missing:
            reason = other["failure"] or f"nothing in {', '.join(sorted(missing))}"
            raise RuntimeError(
                f"mgrpo: the plug-in must be loaded in every worker, got on worker {rank}: {reason}. Install the same "
                "mgrpo[verl] on every node, and leave VERL_USE_EXTERNAL_PLUGINS unset or name mgrpo in it."
            )
        versions = {name: other[name] for name in ("mgrpo", "verl")}
        if any(versions[name] != own[name] for name in versions):
            raise RuntimeError(
                f"mgrpo: every worker must have mgrpo {own['mgrpo']} and verl {own['verl']}, got {versions} on worker "
                f"{rank}. Install the same packages on every node."
            )
