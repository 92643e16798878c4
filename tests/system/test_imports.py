from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mgrpo
import mgrpo_kernels

ROOTS = {package.__name__: Path(package.__file__).parent for package in (mgrpo, mgrpo_kernels)}


def module_name(path):
    """Dotted name of a source file."""
    package = next(name for name, root in ROOTS.items() if path.is_relative_to(root))
    parts = [package, *path.relative_to(ROOTS[package]).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for root in ROOTS.values() for path in sorted(root.rglob("*.py"))}


def imported(path, *, deferred=True):
    """Modules that a file imports, those only for type checking left out; `deferred` keeps those inside functions."""
    found = set()

    def walk(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes = node.orelse
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not deferred:
            nodes = []
        else:
            nodes = ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from package import name` may mean a module of the package.
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in nodes:
            walk(child)

    walk(ast.parse(path.read_text()))
    return found


def own(names):
    """The modules of this repository behind imported names."""
    return {next((n for n in (name, name.rpartition(".")[0]) if n in SOURCES), None) for name in names} - {None}


def top_level(path):
    return {name.partition(".")[0] for name in imported(path)}


KERNELS = [name for name in SOURCES if name.startswith("mgrpo_kernels")]
# From the bottom up: a folder imports itself and those before it.
LAYERS = (
    *("errors types inputs config presets process", "distributed", "tasks", "grading", "algorithm", "models"),
    *("data", "observe", "rollout", "evaluation", "training", "run"),
)
COMMANDS = {"train", "evaluate", "export", "report", "doctor"}
BASE = set(LAYERS[0].split())
PLUG_INS_IMPORT = BASE | {"distributed", "grading", "algorithm", "models", "data", "observe", "integrations"}
# Who may import transformers, beside the plug-ins.
KNOW_TRANSFORMERS = (
    "mgrpo.models.",
    "mgrpo.tasks.",
    *(f"mgrpo.rollout.{n}" for n in ("transformers", "decoding", "choice")),
)


def folder(name):
    """The folder of a module of mgrpo, or its name where it lies in none."""
    return name.split(".")[1] if "." in name else ""


def test_sources_are_found():
    assert len(KERNELS) > 10 and "mgrpo.rollout" in SOURCES
    assert own({"mgrpo.rollout.engine.Engine", "mgrpo.errors", "torch.nn"}) == {"mgrpo.rollout.engine", "mgrpo.errors"}
    placed = {name for layer in LAYERS for name in layer.split()} | COMMANDS | {"integrations", "moved", ""}
    assert {folder(name) for name in SOURCES if name not in KERNELS} <= placed


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_know_no_training(name):
    assert not top_level(SOURCES[name]) & {"mgrpo", "transformers", "vllm", "tyro", "datasets", "rich"}


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in KERNELS])
def test_transformers_is_known_in_one_layer_only(name):
    known = top_level(SOURCES[name])
    if not name.startswith((*KNOW_TRANSFORMERS, "mgrpo.integrations.")):
        assert "transformers" not in known
    if not name.startswith("mgrpo.models.adapter"):
        assert "peft" not in known
    if not name.startswith(("mgrpo.rollout.vllm.", "mgrpo.rollout.weights.", "mgrpo.integrations.")):
        assert "vllm" not in known


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_a_folder_imports_those_below_it_alone(layer):
    allowed = {name for below in LAYERS[: layer + 1] for name in below.split()}
    for name in (name for name in SOURCES if name not in KERNELS and folder(name) in LAYERS[layer].split()):
        assert {folder(module) for module in own(imported(SOURCES[name])) if module.startswith("mgrpo.")} <= allowed, (
            name
        )


def test_plug_ins_need_neither_trainer_nor_engines():
    for name in (name for name in SOURCES if folder(name) == "integrations"):
        used = {folder(module) for module in own(imported(SOURCES[name])) if module.startswith("mgrpo.")}
        assert used <= PLUG_INS_IMPORT, name


def test_one_folder_knows_process_groups():
    """Beside the plug-ins, which are guests in a host's, and the sender of weights to vLLM, which opens vLLM's."""
    guests = (*KERNELS, "mgrpo.rollout.weights.nccl")
    for name in (n for n in SOURCES if folder(n) not in ("distributed", "integrations") and n not in guests):
        assert not {module for module in imported(SOURCES[name]) if module.startswith("torch.distributed")}, name


def test_every_module_is_imported_or_run():
    used = set().union(*(own(imported(path)) - {name} for name, path in SOURCES.items()))
    started = {f"mgrpo.{name}" for name in COMMANDS} | {"mgrpo", "mgrpo_kernels", "mgrpo_kernels.testing"}
    # By name: plug-ins that a host imports, and what runs in a process of a host or of the answer checker.
    started |= {name for name in SOURCES if name.startswith("mgrpo.integrations.")} | {"mgrpo.rollout.worker"}
    started |= {"mgrpo.grading.fingerprint", "mgrpo.grading.precision"}
    loose = {name for name in SOURCES.keys() - used - started if SOURCES[name].name != "__init__.py"}
    assert not {name for name in loose if name.split(".")[-1] not in {"cpu", "cuda", "native", "triton", "reference"}}


def test_nothing_needs_the_plug_ins():
    for name in (name for name in SOURCES if not name.startswith("mgrpo.integrations")):
        assert not {module for module in own(imported(SOURCES[name])) if module.startswith("mgrpo.integrations")}, name
        assert not top_level(SOURCES[name]) & {"trl", "verl", "openrlhf", "accelerate"}, name


def test_no_import_goes_round_in_a_circle():
    graph = {name: own(imported(path)) - {name} for name, path in SOURCES.items()}
    assert graph["mgrpo.training.trainer"] >= {"mgrpo.training.learner", "mgrpo.training.state"}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError and names the circle
    assert order.index("mgrpo.config") < order.index("mgrpo.training.trainer") < order.index("mgrpo.run.loop")


def run_python(code):
    """Runs code in a process of its own, from this checkout."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOTS["mgrpo"].parent, timeout=900
    )


BLOCK = """
import sys
BLOCKED = {"mgrpo", "transformers", "vllm", "tyro", "datasets", "rich", "matplotlib", "pyarrow", "tokenizers"}
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Wall())
"""


def test_kernels_work_where_nothing_but_torch_is_installed():
    code = BLOCK + (
        "import torch, mgrpo_kernels as K\n"
        "out = K.token_logprob(torch.randn(3, 5), torch.tensor([0, 1, 4]), temperature=0.7)\n"
        "assert torch.isfinite(out.logprob).all()\n"
        "print('sound', sorted(BLOCKED & set(sys.modules)))\n"
    )
    result = run_python(code)
    assert result.stdout == "sound []\n", result.stderr
    assert "blocked: transformers" in run_python(BLOCK + "import transformers").stderr


def test_configuration_needs_no_torch():
    result = run_python("import sys, mgrpo.presets; print('torch' in sys.modules, 'transformers' in sys.modules)")
    assert result.stdout == "False False\n", result.stderr


def test_nobody_asks_an_engine_for_its_class_outside_of_rollout():
    asks = re.compile(r"isinstance\([^)]*Engine")
    for name in (name for name in SOURCES if name.startswith("mgrpo.") and folder(name) != "rollout"):
        assert not asks.search(SOURCES[name].read_text()), name


def test_files_and_functions_are_short():
    for name, path in SOURCES.items():
        assert len(path.read_text().splitlines()) <= (500 if name in KERNELS else 400), name
        most = 150 if name in KERNELS else 60
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < most, f"{name}.{node.name}"
