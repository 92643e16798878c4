from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mgrpo_kernels import backends

DOCS = Path(__file__).parents[2] / "docs"
WIDE = {"avx2": re.compile(r"%zmm|%tmm"), "other": re.compile(r"%[yz]mm|%tmm")}


def run_python(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MGRPO_")} | variables
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


def test_no_function_of_one_instruction_set_is_shared_with_a_lesser_one():
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed")
    library = importlib.import_module("mgrpo_kernels._C").__file__
    listing = subprocess.run(
        [objdump, "-dC", "--no-show-raw-insn", library], capture_output=True, text=True, check=True
    )
    home, name, seen, strays = "other", "", set(), set()
    for line in listing.stdout.splitlines():
        if line.endswith(">:"):
            name = line.partition("<")[2]
            home = next((isa for isa in ("avx512", "avx2") if f"mgrpo::{isa}::" in name), "other")
            seen.add(home)
        elif home != "avx512" and WIDE[home].search(line):
            strays.add(name)
    assert "avx512" in seen or os.uname().machine != "x86_64"
    assert not strays


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def test_the_instruction_set_can_be_forced(isa):
    done = run_python("from mgrpo_kernels import backends; print(backends()['cpu'].reason)", MGRPO_CPU_ISA=isa)
    if "on this processor" in done.stdout:
        pytest.skip(f"this processor has no {isa}")
    assert done.stdout.strip() == f"compiled, instruction set {isa}", done.stderr


def test_an_unknown_instruction_set_makes_the_backend_unavailable_and_says_why():
    script = (
        "import torch, mgrpo_kernels as K\n"
        "print(K.backends()['cpu'])\n"
        "K.group_advantage(torch.rand(2, 2))\n"
        "K.group_advantage(torch.rand(2, 2), backend='cpu')"
    )
    done = run_python(script, MGRPO_CPU_ISA="avx1024")
    assert "available=False" in done.stdout
    assert "MGRPO_CPU_ISA must be one of portable to" in done.stdout
    names = re.search(r"ValueError: group_advantage: backend must be one of (.*), got 'cpu'", done.stderr)
    assert names and "'reference'" in names[1] and "'cpu'" not in names[1]


def test_without_the_compiled_library_the_reference_runs():
    script = (
        "import sys; sys.modules['mgrpo_kernels._C'] = None\n"
        "import torch, mgrpo_kernels as K\n"
        "print(K.backends()['cpu'].available, K.group_advantage(torch.tensor([[0.0, 1.0]]), mode='mean').tolist())"
    )
    done = run_python(script)
    assert done.stdout.split(maxsplit=1) == ["False", "[[-0.5, 0.5]]\n"], done.stderr


def test_one_log_line_tells_the_choice():
    script = (
        "import logging, torch, mgrpo_kernels as K\n"
        "logging.basicConfig(level=logging.INFO, format='%(name)s: %(message)s')\n"
        "for _ in range(3): K.group_advantage(torch.rand(2, 2))"
    )
    lines = run_python(script).stderr.splitlines()
    assert lines == [f"mgrpo_kernels: group_advantage on cpu: backend cpu ({backends()['cpu'].reason})"]


def test_the_variable_forces_a_backend():
    script = (
        "import logging, torch, mgrpo_kernels as K; logging.basicConfig(level=20); K.group_advantage(torch.rand(2, 2))"
    )
    assert "backend reference" in run_python(script, MGRPO_BACKEND="reference").stderr


@pytest.mark.parametrize("page", ["kernels.md"])
def test_every_example_of_the_page_runs(page):
    examples = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    assert len(examples) >= 8
    for example in examples:
        assert len(example.splitlines()) <= 12
        exec(compile(example, page, "exec"), {})
