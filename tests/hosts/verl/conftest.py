"""Shared by the tests of the verl plug-in: stock verl on a CPU, `make test-verl`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from threads import one_thread  # noqa: F401

HERE = Path(__file__).parent
# What needs no verl is tested without it too.
PURE = {"test_verl_judging.py", "test_verl_options.py"}
HAS_VERL = find_spec("verl") is not None
collect_ignore = [] if HAS_VERL else sorted(p.name for p in HERE.glob("test_*.py") if p.name not in PURE)

if HAS_VERL:
    # Before anything imports verl, which asks at once what machine it is on.
    os.environ["VERL_USE_EXTERNAL_MODULES"] = "cpu_platform,tiny_rollout"
    warnings.filterwarnings("ignore", message=".* engine is not available")
    # In this order: an import of a submodule of verl that is not there yet would load the plug-in half-way.
    import verl  # noqa: F401


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    from small_verl import write_model

    return write_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    from small_verl import write_data

    return write_data(tmp_path_factory.mktemp("data") / "train.parquet")


@pytest.fixture
def compose(model_folder, data_file, tmp_path) -> Callable[..., Any]:
    """The configuration of the small run as stock verl would see it: `compose(mgrpo__filter__k=2)`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from small_verl import overrides

    def make(*more: str, **changes: Any) -> Any:
        options = [o for o in overrides(model_folder, data_file, tmp_path, **changes) if not o.startswith("hydra.")]
        with initialize_config_module("mgrpo.integrations.verl_config", version_base=None):
            return hydra_compose("mgrpo", overrides=[*options, *more])

    return make
