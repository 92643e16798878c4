"""The plan of `--dry-run`: what a run would take."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM

from mgrpo.config import Config
from mgrpo.data import Dataset
from mgrpo.policy import Tokenizer, load_tokenizer, pick_device
from mgrpo.prompts import describe_data, describe_labels, load_prompts
from mgrpo.rollout.stop import make_stop
from mgrpo.scoring import MAX_LOGITS_BYTES
from mgrpo.trainer import needs_initial
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


def print_plan(config: Config) -> None:
    """Prints labels, batch arithmetic, memory by part, and the kernel backend of every op."""
    console = Console()
    tokenizer = load_tokenizer(config.model)
    data = load_prompts(config, tokenizer, config.data.train)
    probe = load_prompts(config, tokenizer, config.data.probe) if config.data.probe else None
    device = pick_device(config.model.device)
    for title, rows in (
        ("data", data_plan(data, probe)),
        ("batch", [*batch_plan(config, data), *stop_plan(config, tokenizer)]),
        ("memory", memory_plan(config, tokenizer, data)),
        (
            "kernels",
            [(op, resolve(op, device, config.kernels.backend)) for op in OPS],
        ),
    ):
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in rows:
            table.add_row(name, value)
        console.print(table)


def data_plan(data: Dataset, probe: Dataset | None) -> list[tuple[str, str]]:
    """Labels of the data as they will be compared, and what a person should know of them."""
    rows = [("labels", describe_labels(data)), *(("", said) for said in describe_data(data))]
    if probe:
        rows += [("labels of the probe", describe_labels(probe)), *(("", said) for said in describe_data(probe))]
    return [(name, escape(value)) for name, value in rows]


def batch_plan(config: Config, data: Dataset) -> list[tuple[str, str]]:
    """Counts of one step and of the run."""
    r, group = config.rollout, config.rollout.policy + config.rollout.momentum
    longest = max(len(prompt.ids) for prompt in data.prompts)
    return [
        ("prompts", f"{len(data):,} ({data.num_overlong} overlong dropped), longest {longest} tokens"),
        ("rollouts a step", f"{r.prompts} prompts x ({r.policy} policy + {r.momentum} momentum) = {r.prompts * group}"),
        ("in the loss", f"{r.prompts * (config.num_train + r.momentum * config.objective.momentum_in_loss)} at most"),
        ("response tokens a step", f"{r.prompts * group * r.max_new_tokens:,} at most"),
        ("steps", f"{config.steps:,} = {config.steps * r.prompts / len(data):.2f} epochs"),
        ("optimiser steps", f"{config.num_optimizer_steps:,}"),
    ]


def stop_plan(config: Config, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Texts at which a response ends, and where they are from."""
    stop = make_stop(config.rollout.stop, config.data.template, tokenizer.tokenizer)
    if stop is None:
        return []
    texts = escape(", ".join(map(repr, stop.texts)))
    origin = "; by --data.template, --rollout.stop '' turns it off" if config.rollout.stop is None else ""
    return [("responses end at", f"EOS, {texts}{origin}")]


def memory_plan(config: Config, tokenizer: Tokenizer, data: Dataset) -> list[tuple[str, str]]:
    """Bytes of each part that grows with the model or the batch; activations are not in it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            tokenizer.model_config, trust_remote_code=config.model.trust_remote_code
        )
    num_parameters = sum(p.numel() for p in model.parameters())
    text = tokenizer.model_config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    half = config.model.dtype == "bf16"
    longest = max(len(prompt.ids) for prompt in data.prompts) + config.rollout.max_new_tokens
    per_call = max(config.rollout.policy, config.rollout.momentum)
    sequences = min(max(config.rollout.batch_size // per_call, 1), config.rollout.prompts) * per_call
    cache = 2 * text.num_hidden_layers * heads * head_dim * longest * sequences * (2 if half else 4)
    parts = {
        "weights (fp32)": 4 * num_parameters,
        "gradient (fp32)": 4 * num_parameters,
        "AdamW moments (fp32)": 8 * num_parameters,
        f"momentum ({config.momentum.dtype})": MOMENTUM_BYTES[config.momentum.dtype] * num_parameters,
        "rollout copy (bf16)": 2 * num_parameters if half else 0,
        "initial weights": (2 if half else 4) * num_parameters if needs_initial(config) else 0,
        "logits of a micro-batch": min(4 * config.optim.micro_batch_tokens * text.vocab_size, MAX_LOGITS_BYTES),
        f"KV cache of {sequences} x {longest} tokens": cache,
    }
    rows = [("parameters", f"{num_parameters:,}")]
    rows += [(name, f"{size / 2**20:,.1f} MiB") for name, size in parts.items() if size]
    return [*rows, ("sum, without activations", f"{sum(parts.values()) / 2**20:,.1f} MiB")]
