"""Options that make a run fit into memory, and what each of them saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from mgrpo.config import Config
from mgrpo.config.run import process_problems
from mgrpo.errors import ConfigError
from mgrpo.inputs import as_bytes
from mgrpo.run.memory import Job, Memory, plan_memory

MAX_GPUS = 64
MIN_TOKENS = 1024  # of a micro-batch: fewer save little


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Memory to plan for, in bytes; None is not known."""

    device: int | None  # of a GPU; without a GPU of the host
    host: int | None  # of a machine with GPUs; None without a GPU
    on_gpu: bool

    def needed(self, memory: Memory, ranks: int) -> int:
        """What `device` has to hold: of one rank on a GPU, of all of them without one."""
        return memory.device if self.on_gpu else memory.of_all(ranks)


class Remedy(NamedTuple):
    """A change of options."""

    flag: str
    config: Config
    ranks: int


def memory_problems(config: Config, job: Job, limits: Limits) -> list[str]:
    """A message for each memory that is too small, with the two cheapest remedies."""
    memory, problems = plan_memory(config, job), []
    needed = limits.needed(memory, job.ranks)
    if limits.device is not None and needed > limits.device:
        what = "a rank must fit into the GPU's" if limits.on_gpu else "the run must fit into the host's"
        found = [
            (remedy.flag, limits.needed(plan_memory(remedy.config, replace(job, ranks=remedy.ranks)), remedy.ranks))
            for remedy in device_remedies(config, job, limits)
        ]
        problems.append(
            f"memory: {what} {as_bytes(limits.device)}, got {as_bytes(needed)}." + _advice(found, needed, limits.device)
        )
    needed = memory.host(job.ranks)
    if limits.on_gpu and limits.host is not None and needed > limits.host:
        found = [
            (r.flag, plan_memory(r.config, replace(job, ranks=r.ranks)).host(r.ranks))
            for r in host_remedies(config, job)
        ]
        ranks = f" of {job.ranks} ranks" * (job.ranks > 1)
        what = f"memory: the host's part{ranks} must fit into its {as_bytes(limits.host)}, got {as_bytes(needed)}."
        problems.append(what + _advice(found, needed, limits.host))
    return problems


def _advice(found: list[tuple[str, int]], needed: int, limit: int) -> str:
    """A sentence about two remedies: the first that suffice alone, else those that save most."""
    saving = [(flag, needed - then) for flag, then in found if then < needed]
    enough = [entry for entry in saving if needed - entry[1] <= limit]
    chosen = (enough + sorted((entry for entry in saving if entry not in enough), key=lambda entry: -entry[1]))[:2]
    texts = [f"{flag} saves {as_bytes(saved)}" for flag, saved in chosen]
    alone = (
        ""
        if enough or not chosen
        else ", which is not enough alone"
        if len(chosen) == 1
        else ", neither is enough alone"
    )
    return f" {', '.join(texts)}{alone}." if texts else ""


def device_remedies(config: Config, job: Job, limits: Limits) -> Iterator[Remedy]:
    """Changes that save memory of the device, those that cost least time and exactness first."""
    c = config

    def fits(changed: Config, ranks: int) -> bool:
        memory = plan_memory(changed, replace(job, ranks=ranks))
        return limits.device is None or limits.needed(memory, ranks) <= limits.device

    def halved(group: str, name: str, least: int) -> Iterator[Remedy]:
        """The largest half, quarter, ... that fits, else the least."""
        value = getattr(getattr(c, group), name)
        while value // 2 >= least:
            value //= 2
            changed = _changed(c, group, **{name: value})
            if changed and (fits(changed, job.ranks) or value // 2 < least):
                yield Remedy(f"--{group}.{name} {value}".replace("_", "-"), changed, job.ranks)
                return

    def switched(flag: str, group: str, **values: object) -> Iterator[Remedy]:
        changed = _changed(c, group, **values)
        if changed and not process_problems(changed, job.ranks):
            yield Remedy(flag, changed, job.ranks)

    if c.engine.name == "vllm":
        yield from switched("--engine.sleep", "engine", sleep=True)
    else:
        yield from halved("engine", "batch_size", 1)
    yield from halved("optim", "micro_batch_tokens", MIN_TOKENS)
    yield from switched("--model.gradient-checkpointing", "model", gradient_checkpointing=True)
    yield from switched("--momentum.device cpu", "momentum", device="cpu")
    yield from switched("--optim.offload", "optim", offload=True)
    if not limits.on_gpu:
        yield from switched("--checkpoint.no-background", "checkpoint", background=False)
    ranks = 2 * job.ranks
    while limits.on_gpu and ranks <= MAX_GPUS:
        changed = _changed(c, "distributed", processes=ranks)
        if changed and (fits(changed, ranks) or 2 * ranks > MAX_GPUS):
            yield Remedy(f"--distributed.processes {ranks}", changed, ranks)
            return
        ranks *= 2
    yield from switched("--momentum.dtype bf16-stochastic", "momentum", dtype="bf16-stochastic")


def host_remedies(config: Config, job: Job) -> Iterator[Remedy]:
    """Changes that save memory of the host."""
    for flag, group, values in (
        ("--checkpoint.no-background", "checkpoint", {"background": False}),
        ("--momentum.device same", "momentum", {"device": "same"}),
        ("--optim.no-offload", "optim", {"offload": False}),
    ):
        changed = _changed(config, group, **values)
        if changed:
            yield Remedy(flag, changed, job.ranks)
    fewer = _changed(config, "distributed", processes=job.ranks // 2) if job.ranks > 1 else None
    if fewer:
        yield Remedy(f"--distributed.processes {job.ranks // 2}", fewer, job.ranks // 2)


def _changed(config: Config, group: str, **values: object) -> Config | None:
    """The configuration with other options of a group; None if they contradict others."""
    try:
        return replace(config, **{group: replace(getattr(config, group), **values)})
    except ConfigError:
        return None
