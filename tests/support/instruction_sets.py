"""The tests of a file on one instruction set of the compiled kernels, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def assert_pass_on(isa: str, file: str, keywords: str) -> None:
    """Runs the tests of `file` that `-k keywords` takes; skips where this processor has no such instructions."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", keywords]
    env = os.environ | {"MGRPO_CPU_ISA": isa}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    if "on this processor" in done.stdout + done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stdout[-3000:]
