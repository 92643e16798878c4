"""A small run of stock verl on a CPU: the shipped base, four prompts a step, four and two rollouts of each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODULES = "cpu_platform,tiny_rollout"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
CONFIG = ("--config-path", "pkg://mgrpo.integrations.verl_config", "--config-name", "mgrpo")


def write_model(folder: Path) -> Path:
    """The shipped base with a chat template, which verl applies to every prompt."""
    from transformers import AutoTokenizer

    from mgrpo.models.tokenizer import resolve_path

    shutil.copytree(resolve_path("builtin:arithmetic"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    # verl looks these up for every model of Qwen's; nothing is ever encoded with them.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    return folder


def write_data(path: Path, *, count: int = 16, labels: Any = None) -> Path:
    """Problems as verl reads them; `labels(i, answer)` is what stands as the true answer."""
    import pandas

    from mgrpo.tasks.arithmetic import make_problems

    rows = [
        {
            "prompt": [{"role": "user", "content": problem.prompt}],
            "data_source": "arithmetic",
            "reward_model": {"style": "rule", "ground_truth": labels(i, problem.answer) if labels else problem.answer},
            "extra_info": {"index": i},
        }
        for i, problem in enumerate(make_problems(count, operands=(2, 3), seed=0))
    ]
    pandas.DataFrame(rows).to_parquet(path)
    return path


def overrides(model: Path, data: Path, folder: Path, **changes: Any) -> list[str]:
    """Options of a small run; `changes` are more of them, with `__` for the dot."""
    options = {
        "actor_rollout_ref.model.path": model,
        "actor_rollout_ref.model.use_remove_padding": False,
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
        "actor_rollout_ref.rollout.name": "tiny",
        "actor_rollout_ref.rollout.n": 4,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 8,
        "actor_rollout_ref.rollout.agent.num_workers": 1,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 2,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.actor.use_torch_compile": False,
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
        "actor_rollout_ref.actor.fsdp_config.dtype": "float32",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 8,
        # The reference model is offloaded to pinned memory, which needs an accelerator.
        "actor_rollout_ref.actor.use_kl_loss": False,
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant",
        "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": 0.0,
        "data.train_files": data,
        "data.val_files": data,
        "data.train_batch_size": 4,
        "data.max_prompt_length": 32,
        "data.max_response_length": 20,
        "data.dataloader_num_workers": 0,
        "mgrpo.rollout.num_momentum": 2,
        "mgrpo.answer.extract": r"'regex:#(\d\d)'",
        "mgrpo.answer.equivalence": "exact",
        "reward.num_workers": 1,
        "trainer.device": "cpu",
        "trainer.n_gpus_per_node": 1,
        "trainer.logger": "[console]",
        "trainer.total_training_steps": 2,
        "trainer.default_local_dir": folder / "checkpoints",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "ray_kwargs.ray_init.num_cpus": 8,
        "+ray_kwargs.ray_init.num_gpus": 1,
        "+ray_kwargs.ray_init.include_dashboard": False,
        "hydra.run.dir": folder / "hydra",
    } | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in options.items()]


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """Of a process of verl, and so of Ray's workers."""
    return {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "VERL_USE_EXTERNAL_MODULES": MODULES,
        "TINY_ROLLOUT_LOG": str(folder / "rollout.jsonl"),
        "TINY_ROLLOUT_TOKENS": "20",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        **changes,
    }


def train(folder: Path, arguments: list[str], *, timeout: float = 420, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs stock verl's own entry point."""
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "verl.trainer.main_ppo", *CONFIG, *arguments],
        env=environment(folder, **env),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def events(folder: Path) -> list[dict[str, Any]]:
    """What the rollout engine has seen."""
    return [json.loads(line) for line in (folder / "rollout.jsonl").read_text().splitlines()]
