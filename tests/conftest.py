"""Settings that every test shares."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from mgrpo.process.threads import wait_passively

# As every command does, before torch loads.
wait_passively()

import torch  # noqa: E402

# Tests import bench/ too. Last, so that a copy of the package under test stays ahead of the one beside bench/.
sys.path.append(str(Path(__file__).parents[1]))

# Under nohup a hang-up is ignored, by every process that a test starts too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every run, so that a failure belongs to a change; `make fuzz` looks for new ones.
# No example has a deadline, nor their making one, which a busy machine would miss.
PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, **PATIENT)
settings.register_profile("fuzz", derandomize=False, print_blob=True, **PATIENT)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests that are marked long")
    parser.addoption("--fault-table", action="store_true", help="print what became of every injected fault")
    parser.addoption("--verify-record", metavar="DIR", help="write which operations passed, for bench/verified.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Tests come in a random order, whose seed pytest prints; what they draw is theirs alone, with seeds of their own.
    if hasattr(config.option, "randomly_reset_seed"):
        config.option.randomly_reset_seed = False
    if config.getoption("--fault-table"):
        from chaos import FaultTable

        config.pluginmanager.register(FaultTable())
    folder = config.getoption("--verify-record")
    if folder:
        from verification import Recorder

        config.pluginmanager.register(Recorder(Path(str(folder))))
