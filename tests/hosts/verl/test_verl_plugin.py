"""How stock verl finds the plug-in, and what it says where it can not be loaded. Each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mgrpo.integrations.verl import plugin

ASK = """
import json, sys
import verl
failed = "mgrpo.integrations.verl" not in sys.modules
print("FOUND", json.dumps(None if failed else sys.modules["mgrpo.integrations.verl"].describe()))
"""


def ask(*paths, **env) -> tuple[dict | None, str]:
    """What `import verl` alone has registered, and stderr."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASK],
        capture_output=True,
        text=True,
        timeout=900,
        env={k: v for k, v in os.environ.items() if not k.startswith("VERL_")}
        | {"PYTHONPATH": os.pathsep.join(map(str, paths)), **env},
    )
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND ")), result.stderr


def test_import_verl_loads_the_plug_in_by_its_entry_point():
    found, errors = ask()
    assert found and set(found["registered"]) == {"TRAINER_REGISTRY", "ADV_ESTIMATOR_REGISTRY"}, errors
    assert found["failure"] is None and found["verl"] == "0.9.1"


def test_without_entry_points_nothing_is_loaded_and_a_module_name_loads_it():
    assert ask(VERL_USE_EXTERNAL_PLUGINS="none")[0] is None
    found, errors = ask(VERL_USE_EXTERNAL_PLUGINS="none", VERL_USE_EXTERNAL_MODULES="mgrpo.integrations.verl")
    assert found and set(found["registered"]) == {"TRAINER_REGISTRY", "ADV_ESTIMATOR_REGISTRY"}, errors


def test_a_plug_in_that_fails_is_seen_though_verl_goes_on(tmp_path):
    (tmp_path / "transfer_queue.py").write_text('raise ImportError("broken on purpose")\n')
    found, errors = ask(tmp_path)
    assert found is None  # verl has swallowed it
    assert "Traceback" in errors and "broken on purpose" in errors
    assert "ERROR: mgrpo's plug-in for verl failed to load (ImportError: broken on purpose)" in errors
    assert "it supports verl >=0.9.1,<0.10" in errors


def test_another_version_of_verl_is_refused(tmp_path):
    metadata = tmp_path / "verl-0.10.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: verl\nVersion: 0.10.0\n")
    found, errors = ask(tmp_path)
    assert found is None
    assert "verl must be >=0.9.1,<0.10, got 0.10.0. pip install 'verl>=0.9.1,<0.10'" in errors


def worker(**changes):
    return plugin.describe() | changes


def test_workers_with_the_same_plug_in_are_accepted():
    assert set(worker()["registered"]) == {"TRAINER_REGISTRY", "ADV_ESTIMATOR_REGISTRY"}
    plugin.check_processes([worker(), worker()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"registered": ["TRAINER_REGISTRY"]}, r"got on worker 1: nothing in ADV_ESTIMATOR_REGISTRY"),
        ({"failure": "ImportError: x"}, r"got on worker 1: ImportError: x. Install the same mgrpo\[verl\]"),
        ({"verl": "0.9.2"}, r"every worker must have mgrpo .* and verl 0.9.1, got .*0.9.2.* on worker 1"),
        ({"mgrpo": "9"}, r"every worker must have mgrpo"),
    ],
)
def test_a_worker_without_the_plug_in_or_with_another_stops_the_start(changes, message):
    with pytest.raises(RuntimeError, match=message):
        plugin.check_processes([worker(), worker(**changes)])
