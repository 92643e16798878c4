from __future__ import annotations

import ast
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
# The layer that knows transformers; tasks make models and tokenizers of their own.
KNOW_TRANSFORMERS = {
    "mgrpo.rollout.transformers",
    "mgrpo.rollout.decoding",
    "mgrpo.rollout.choice",
    "mgrpo.determinism",
    "mgrpo.policy",
    "mgrpo.scoring",
    "mgrpo.plan",
}


def test_sources_are_found():
    assert len(KERNELS) > 10 and "mgrpo.rollout" in SOURCES and KNOW_TRANSFORMERS < SOURCES.keys()
    assert own({"mgrpo.rollout.engine.Sampling", "mgrpo.checkpoint", "torch.nn"}) == {
        "mgrpo.rollout.engine",
        "mgrpo.checkpoint",
    }


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_know_no_training(name):
    assert not top_level(SOURCES[name]) & {"mgrpo", "transformers", "vllm", "tyro", "datasets", "rich"}


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in KERNELS])
def test_transformers_is_known_in_one_layer_only(name):
    if name in KNOW_TRANSFORMERS or name.startswith(("mgrpo.tasks.", "mgrpo.integrations.")):
        return
    assert not top_level(SOURCES[name]) & {"transformers", "vllm"}


def test_nothing_needs_the_plug_ins():
    for name in (name for name in SOURCES if not name.startswith("mgrpo.integrations")):
        assert not {module for module in own(imported(SOURCES[name])) if module.startswith("mgrpo.integrations")}, name
        assert not top_level(SOURCES[name]) & {"trl", "verl", "openrlhf", "accelerate"}, name


def test_configuration_is_at_the_bottom():
    for name in ("mgrpo.config", "mgrpo.inputs"):
        assert not own(imported(SOURCES[name], deferred=False)) - {"mgrpo"}, name


def test_no_import_goes_round_in_a_circle():
    graph = {name: own(imported(path)) - {name} for name, path in SOURCES.items()}
    assert graph["mgrpo.trainer"] >= {"mgrpo.learner", "mgrpo.checkpoint"}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError and names the circle
    assert order.index("mgrpo.config") < order.index("mgrpo.trainer") < order.index("mgrpo.run")


def run_python(code):
    """Runs code in a process of its own, from this checkout."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOTS["mgrpo"].parent, timeout=120
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
