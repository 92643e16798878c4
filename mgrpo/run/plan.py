"""The plan of `--dry-run`: data, batch sizes, memory and kernels of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.markup import escape
from rich.table import Table

from mgrpo.config import Config
from mgrpo.data.load import describe_data, describe_labels, load_prompts
from mgrpo.data.prompts import Dataset
from mgrpo.inputs import as_bytes, read_bytes
from mgrpo.models.device import pick_backend
from mgrpo.models.measure import ModelSize, measure_size
from mgrpo.models.tokenizer import Tokenizer, load_tokenizer, resolve_path
from mgrpo.process.display import make_console
from mgrpo.process.memory import host_memory
from mgrpo.rollout.stop import make_stop
from mgrpo.run.memory import Job, plan_memory
from mgrpo.run.preflight import count_adapter, num_processes, planned_device
from mgrpo.run.remedies import Limits, memory_problems

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
PHASES = {
    "start": "at the start",
    "always": "",
    "rollout": "in rollouts",
    "score": "in scoring",
    "update": "in updates",
}


class Plan(NamedTuple):
    """Outcome of the plan."""

    problems: list[str]
    """What does not fit into memory."""
    untried: str | None
    """The reason why the model cannot be loaded and tried; None if it can."""


def print_plan(config: Config) -> Plan:
    """Prints data, batch sizes, memory of a rank by part, and the kernel backend of every op."""
    console = make_console()
    tokenizer = load_tokenizer(config.model)
    data = load_prompts(config, tokenizer, config.data.train)
    eval_set = load_prompts(config, tokenizer, config.data.probe) if config.data.probe else None
    device, backend = planned_device(config), config.kernels.backend
    for title, rows in (
        ("data", data_plan(data, eval_set)),
        ("batch", [*batch_plan(config, data), *stop_plan(config, tokenizer)]),
        ("kernels", [(op, pick_backend(backend, device, op, ())) for op in OPS]),
    ):
        console.print(table(title, rows))
    ranks, limits = num_processes(config), memory_limits(config, device)
    size = measure(config, tokenizer.model_config, ranks)
    if size is None:
        console.print(table("memory", [("parameters", "not known before the model is loaded")]))
        return Plan([], reason_untried(config, 0))
    longest = max(len(prompt.ids) for prompt in data.prompts) + config.rollout.max_new_tokens
    adapter = count_adapter(config, tokenizer)
    place = {"device_memory": limits.device, "on_gpu": limits.on_gpu}
    job = Job(size=size, longest=longest, ranks=ranks, **place, adapter=adapter)
    title = f"memory of each of {ranks} ranks" if ranks > 1 else "memory"
    console.print(table(title, memory_rows(config, job, limits)))
    return Plan(memory_problems(config, job, limits), reason_untried(config, size.parameters, adapter))


def measure(config: Config, model_config: Any, ranks: int) -> ModelSize | None:
    """Size of the model of a run on a number of ranks; None if it cannot be built from its configuration alone."""
    half = config.model.dtype == "bf16"
    cast = ranks == 1 or config.distributed.tree  # autocast, not FSDP, lowers the precision
    return measure_size(
        model_config,
        attention=config.model.attn_implementation,
        autocast=half and cast,
        half=half and not cast,
        trust_remote_code=config.model.trust_remote_code,
    )


def table(title: str, rows: Sequence[tuple[str, ...]]) -> Table:
    """A table without a header."""
    result = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        result.add_row(*row)
    return result


def memory_limits(config: Config, device: torch.device) -> Limits:
    """Memory to plan for: that of --dry-run-memory, else that of this machine."""
    host = host_memory().total
    if config.dry_run_memory:
        on_gpu = config.model.device != "cpu"
        return Limits(device=read_bytes(config.dry_run_memory), host=None, on_gpu=on_gpu)
    if device.type == "cuda":
        return Limits(device=torch.cuda.get_device_properties(device).total_memory, host=host, on_gpu=True)
    return Limits(device=host, host=None, on_gpu=False)


def memory_rows(config: Config, job: Job, limits: Limits) -> list[tuple[str, str, str]]:
    """The table of memory: part, bytes, where and when it is held; the last rows are sums and limits."""
    memory = plan_memory(config, job)
    rows = [("parameters", f"{job.size.parameters:,}", "")]
    if job.adapter is not None:
        rows.append(("trained parameters (LoRA)", f"{job.adapter:,}", ""))
    for part in memory.parts:
        place = "on the host" if part.on_host and limits.on_gpu else ""
        rows.append((part.name, as_bytes(part.num_bytes), ", ".join(filter(None, (PHASES[part.phase], place)))))
    most = "most at a time" + ", without activations" * (job.size.activations is None)
    together = f" of {job.ranks} ranks" if job.ranks > 1 else ""
    if limits.on_gpu:
        sums = [(most, memory.device, "of the GPU"), (most + together, memory.host(job.ranks), "of the host")]
        sums += [("there is", limits.device, "of the GPU"), ("there is", limits.host, "of the host")]
    else:
        sums = [(most + together, memory.of_all(job.ranks), ""), ("there is", limits.device, "of the host")]
    return rows + [(name, as_bytes(num_bytes), where) for name, num_bytes, where in sums if num_bytes]


def reason_untried(config: Config, num_parameters: int, adapter: int | None = None) -> str | None:
    """Why the model cannot be loaded and tried here; None if it can."""
    path = resolve_path(config.model.path)
    if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
        return f"{config.model.path} has no weights, which are not checked"
    if config.dry_run_memory:
        return "the plan is for another device"
    if config.distributed.processes not in (None, 1, "auto"):
        return f"the plan is for {config.distributed.processes} processes"
    free = host_memory().free
    # In fp32 the model, the engine's copy, the gradient and the momentum model, or the model and all of an adapter.
    needed = 16 * num_parameters if adapter is None else 4 * num_parameters + 16 * adapter
    if free is not None and needed > free:
        return "it needs more than the free memory of this machine"
    return None


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
