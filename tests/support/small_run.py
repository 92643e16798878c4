"""A small run of MGRPOTrainer on the shipped base."""

from __future__ import annotations

from typing import Any

from mgrpo.models.files import quiet_transformers
from mgrpo.models.tokenizer import resolve_path
from mgrpo.tasks.arithmetic import make_problems

quiet_transformers()
BASE = resolve_path("builtin:arithmetic")


def problems(count: int = 24) -> list[dict[str, str]]:
    return [{"prompt": p.prompt, "answer": p.answer} for p in make_problems(count, operands=(2, 3), seed=0)]


def small_args(folder: Any, **changes: Any) -> Any:
    """4 prompts a step, 4 policy and 2 momentum rollouts of each."""
    from mgrpo.integrations.trl import MGRPOConfig

    options = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "num_momentum_generations": 2,
        "max_completion_length": 20,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "answer_extract": r"regex:#(\d\d)",
        "answer_equivalence": "exact",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return MGRPOConfig(**options | changes)
