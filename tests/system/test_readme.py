"""The Python snippets of README.md run as they stand, on a machine with or without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mgrpo.models.tokenizer import resolve_path

ROOT = Path(__file__).parents[2]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(tmp_path, number):
    shutil.copytree(resolve_path("builtin:arithmetic"), tmp_path / "my-model")
    rows = [{"prompt": "12+34="}, {"prompt": "5+6=", "answer": "11"}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", SNIPPETS[number]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_there_are_snippets_for_the_trainer_and_for_the_kernels():
    assert ["MGRPOTrainer" in text for text in SNIPPETS] == [True, False]
