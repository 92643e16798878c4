"""The plan of `--dry-run`: data, batch sizes, memory and kernels of a run."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mgrpo.config import Config
from mgrpo.data.load import describe_data, describe_labels, load_prompts
from mgrpo.data.prompts import Dataset
from mgrpo.models.device import pick_device
from mgrpo.models.forward import MAX_LOGITS_BYTES
from mgrpo.models.size import cache_numbers, count_parameters, positive
from mgrpo.models.tokenizer import Tokenizer, load_tokenizer
from mgrpo.rollout.stop import make_stop
from mgrpo.training.trainer import needs_initial
from mgrpo_kernels.backends import resolve

# The operations that a training step calls.
OPS = (
    "token_logprob",
    "linear_token_logprob",
    "trajectory_entropy",
    "iqr_filter",
    "majority_vote",
    "group_advantage",
    "grpo_loss",
    "ema_update_",
)


# Bytes a parameter; Kahan compensation is a second bf16 number.
MOMENTUM_BYTES = {"fp32": 4, "bf16-stochastic": 2, "bf16-kahan": 4}


def print_plan(config: Config) -> int | None:
    """Prints data, batch sizes, memory by part and the kernel backend of every op; returns the number of parameters."""
    console = Console()
    tokenizer = load_tokenizer(config.model)
    data = load_prompts(config, tokenizer, config.data.train)
    eval_set = load_prompts(config, tokenizer, config.data.probe) if config.data.probe else None
    device = pick_device(config.model.device)
    num_parameters = count_parameters(tokenizer.model_config, trust_remote_code=config.model.trust_remote_code)
    for title, rows in (
        ("data", data_plan(data, eval_set)),
        ("batch", [*batch_plan(config, data), *stop_plan(config, tokenizer)]),
        ("memory", memory_plan(config, tokenizer, data, num_parameters)),
        (
            "kernels",
            [(op, resolve(op, device, config.kernels.backend)) for op in OPS],
        ),
    ):
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in rows:
            table.add_row(name, value)
        console.print(table)
    return num_parameters


def fits_memory(num_parameters: int | None) -> bool:
    """Whether the model in fp32, the engine's copy, its gradient and its momentum fit into the free memory."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (free,) = (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return True
    return 16 * (num_parameters or 0) <= free


def data_plan(data: Dataset, eval_set: Dataset | None) -> list[tuple[str, str]]:
    """Labels of the data in their compared form, and warnings about them."""
    rows = [("labels", describe_labels(data)), *(("", note) for note in describe_data(data))]
    if eval_set:
        rows += [("labels of the eval set", describe_labels(eval_set))]
        rows += [("", note) for note in describe_data(eval_set)]
    return [(name, escape(value)) for name, value in rows]


def batch_plan(config: Config, data: Dataset) -> list[tuple[str, str]]:
    """Counts of one step and of the run."""
    r = config.rollout
    sources = f"{r.num_policy} policy + {r.num_momentum} momentum"
    num_rollouts = r.num_prompts * (r.num_policy + r.num_momentum)
    num_in_loss = config.num_train + r.num_momentum * config.objective.momentum_in_loss
    longest = max(len(prompt.ids) for prompt in data.prompts)
    return [
        ("prompts", f"{len(data):,} ({data.num_overlong} overlong dropped), longest {longest} tokens"),
        (
            "rollouts a step",
            f"{r.num_prompts} prompts x ({sources}) = {num_rollouts}",
        ),
        (
            "in the loss",
            f"{r.num_prompts * num_in_loss} at most",
        ),
        ("response tokens a step", f"{num_rollouts * r.max_new_tokens:,} at most"),
        ("steps", f"{config.steps:,} = {config.steps * r.num_prompts / len(data):.2f} epochs"),
        ("optimiser steps", f"{config.num_optimizer_steps:,}"),
    ]


def stop_plan(config: Config, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Texts at which a response ends, and their origin."""
    stop = make_stop(config.rollout.stop, config.data.template, tokenizer.tokenizer)
    if stop is None:
        return []
    texts = escape(", ".join(map(repr, stop.texts)))
    origin = "; by --data.template, --rollout.stop '' turns it off" if config.rollout.stop is None else ""
    return [("responses end at", f"EOS, {texts}{origin}")]


def memory_plan(
    config: Config, tokenizer: Tokenizer, data: Dataset, num_parameters: int | None
) -> list[tuple[str, str]]:
    """Memory of each part that grows with the model or the batch, without activations."""
    if num_parameters is None:
        return [("parameters", "not known before the model is loaded")]
    text = tokenizer.model_config.get_text_config()
    half = config.model.dtype == "bf16"
    longest = max(len(prompt.ids) for prompt in data.prompts) + config.rollout.max_new_tokens
    per_call = max(config.rollout.num_policy, config.rollout.num_momentum)
    sequences = min(max(config.engine.batch_size // per_call, 1), config.rollout.num_prompts) * per_call
    logits = 4 * config.optim.micro_batch_tokens * (positive(text, "vocab_size") or 0)
    parts = {
        "weights (fp32)": 4 * num_parameters,
        "gradient (fp32)": 4 * num_parameters,
        "AdamW moments (fp32)": 8 * num_parameters,
        f"momentum ({config.momentum.dtype})": MOMENTUM_BYTES[config.momentum.dtype] * num_parameters,
        "rollout copy (bf16)": 2 * num_parameters if half else 0,
        "initial weights": (2 if half else 4) * num_parameters if needs_initial(config) else 0,
        "logits of a micro-batch": min(logits, MAX_LOGITS_BYTES),
        f"KV cache of {sequences} x {longest} tokens": cache_numbers(text) * longest * sequences * (2 if half else 4),
    }
    rows = [("parameters", f"{num_parameters:,}")]
    rows += [(name, f"{size / 2**20:,.1f} MiB") for name, size in parts.items() if size]
    return [*rows, ("sum, without activations", f"{sum(parts.values()) / 2**20:,.1f} MiB")]
