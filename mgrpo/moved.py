"""Makes modules of version 0.1 importable under their old names for one release, with a deprecation warning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# Modules that kept their names, by folder.
_KEPT = {
    "algorithm": "reward",
    "data": "arrow_files csv_files files json_files keys messages records tables",
    "models": "determinism momentum",
    "observe": "plots retention",
    "process": "threads",
    "run": "plan preflight",
}
_VERL = ("advantage", "options", "queue", "trainer", "worker")
# Old module: modules that have its names now, all within mgrpo.
MOVED = {
    **{name: f"{folder}.{name}" for folder, names in _KEPT.items() for name in names.split()},
    **{f"integrations.trl_{name}": f"integrations.trl.{name}" for name in ("config", "momentum")},
    **{f"integrations.verl_{name}": f"integrations.verl.{name}" for name in _VERL},
    "answers": "grading",
    "chat": "data.template",
    "checkpoint": "run.checkpoint errors process.disk training.state",
    "display": "process.output",
    "forward": "models.plain",
    "integrations.openrlhf_kernels": "integrations.kernels.openrlhf",
    "integrations.outcome": "integrations.shared",
    "integrations.trl_kernels": "integrations.kernels.trl",
    "integrations.truth": "integrations.shared",
    "integrations.verl_judging": "integrations.verl.groups",
    "integrations.verl_kernels": "integrations.kernels.verl",
    "interrupt": "process.signals errors",
    "judging": "algorithm.credit",
    "labels": "grading.label_text",
    "learner": "training.schedule training.learner",
    "metrics": "types observe.catalogue errors observe.timer observe.step observe.trackers process.disk",
    "model_files": "models.files",
    "monitor": "observe.collapse",
    "objective": "algorithm.loss algorithm.advantage",
    "pages": "data.parquet_pages",
    "policy": "models.tokenizer models.device models.load models.files models.momentum",
    "progress": "observe.console",
    "prompts": "data.load",
    "rollout.checked": "rollout.vllm.base rollout.engine",
    "rollout.nccl": "rollout.weights.nccl",
    "rollout.publish": "rollout.weights.in_process",
    "rollout.server": "rollout.vllm.server rollout.vllm.process rollout.vllm.client rollout.weights.http",
    "rollout.start": "rollout.build",
    "run_directory": "run.directory",
    "saving": "models.save",
    "scoring": "models.forward",
    "trainer": "training.trainer training.passes training.observers rollout.generator",
    "trajectories": "types",
    "voting": "algorithm.vote algorithm.filter",
}

# Old and new names in these modules.
RENAMED = {
    "judge": "assign_credit",
    "Judgement": "Credit",
    "Trajectories": "TrajectoryBatch",
    "Scorer": "Forward",
    "TokenScores": "TokenLogProbs",
}


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of MOVED, as the last finder."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The specification of a moved module."""
        package, _, old = name.partition(".")
        return importlib.machinery.ModuleSpec(name, self) if package == "mgrpo" and old in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Gives a module the names of its new modules, each imported on first use."""
        places = [f"mgrpo.{place}" for place in MOVED[module.__name__.partition(".")[2]].split()]
        warnings.warn(f"{module.__name__} has moved to {' and '.join(places)}.", DeprecationWarning, stacklevel=2)

        def find(name: str) -> Any:
            new = RENAMED.get(name, name)
            for place in () if name.startswith("__") else places:
                if hasattr(found := importlib.import_module(place), new):
                    return getattr(found, new)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = find  # pyright: ignore[reportAttributeAccessIssue]


def install() -> None:
    """Makes the old modules importable in this process."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
