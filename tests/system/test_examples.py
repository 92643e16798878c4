"""The examples run, and say what they should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = {"stages.py": [], "trl_mgrpo.py": ["--max-steps", "2", "--prompts", "2"]}


def run(name: str, *flags: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_example_is_left_out():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == FLAGS.keys()


def test_every_stage_alone():
    loss, kept, labels = re.search(r"loss (\S+)  kept (\S+)  labels \[(.*)\]", run("stages.py")).groups()
    assert abs(float(loss)) < 1 and 0.5 < float(kept) <= 1 and len(labels.split(",")) == 4


@pytest.mark.slow
def test_mgrpo_in_trl(tmp_path):
    said = run("trl_mgrpo.py", *FLAGS["trl_mgrpo.py"], "--out", str(tmp_path))
    assert 0.3 < float(re.search(r"accuracy after 2 steps: (\S+)", said)[1]) < 0.6
    assert (tmp_path / "momentum" / "model.safetensors").is_file()
