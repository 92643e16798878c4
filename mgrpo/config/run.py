"""The configuration of a run.

Letters: B prompts a step, M policy rollouts and N momentum rollouts a prompt, G = M + N.
`Config` checks itself and reports all problems at once. Presets are functions in presets.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from mgrpo.config.answer import AnswerConfig
from mgrpo.config.checkpoint import CheckpointConfig
from mgrpo.config.data import DataConfig
from mgrpo.config.distributed import DistributedConfig, world_problems
from mgrpo.config.engine import EngineConfig
from mgrpo.config.eval import EvalConfig
from mgrpo.config.filter import FilterConfig
from mgrpo.config.kernels import KernelsConfig
from mgrpo.config.log import LogConfig
from mgrpo.config.lora import LoraConfig
from mgrpo.config.model import ModelConfig
from mgrpo.config.momentum import MomentumConfig
from mgrpo.config.monitor import MonitorConfig
from mgrpo.config.objective import ObjectiveConfig
from mgrpo.config.optim import OptimConfig
from mgrpo.config.option import RESUMABLE, HomeText, option, range_problems
from mgrpo.config.rollout import RolloutConfig
from mgrpo.config.vote import VoteConfig
from mgrpo.errors import ConfigError
from mgrpo.inputs import read_bytes

MAX_STOP_CHARS = 1000


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the run as a whole."""

    preset: Annotated[str, tyro.conf.Suppress] = "arithmetic"
    """Name of the preset that this configuration started from."""
    run_dir: HomeText | None = option(None, resumable=True)
    """Directory of the run; runs/PRESET-TIME when None."""
    steps: int = option(200, least=1)
    """Rollout batches of the whole run; the schedules span them."""
    seed: int = option(0, least=0, below=2**31)
    """Seed of data order and sampling."""
    threads: int | None = option(None, least=1, most=4096)
    """CPU threads; None is torch's choice, at most the CPUs that affinity and cgroups allow. A run is reproducible to
    the bit only with the same number."""
    stop_after: int | None = option(None, least=1, resumable=True)
    """End early, after this step, under the schedule of `steps`."""
    resume: bool = option(False, resumable=True)
    """Continue from the newest valid checkpoint of run-dir."""
    resume_extend: bool = option(False, resumable=True)
    """With --resume, allow --steps to differ from the value at the start."""
    dry_run: bool = option(False, resumable=True)
    """Check everything, print the plan, load the model, try a token, a gradient and a save, and exit."""
    dry_run_memory: str | None = option(None, resumable=True)
    """With --dry-run, memory of a GPU to plan for instead of this machine's, such as `80GB` or `80GiB`; with
    `--model.device cpu`, of a host."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    vote: VoteConfig = field(default_factory=VoteConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=RESUMABLE)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig, metadata=RESUMABLE)
    monitor: MonitorConfig = field(default_factory=MonitorConfig, metadata=RESUMABLE)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        """Raises ConfigError with all problems."""
        problems = range_problems(self) + combination_problems(self)
        if problems:
            raise ConfigError(problems)

    @property
    def num_train(self) -> int:
        """Policy rollouts a prompt in the loss."""
        return self.rollout.num_policy if self.vote.num_train is None else self.vote.num_train

    @property
    def num_optimizer_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps * self.optim.num_minibatches * self.optim.num_epochs


@dataclass(frozen=True, kw_only=True)
class Unchecked(Config):
    """Options that may contradict one another, of which --dry-run lists all problems."""

    def __post_init__(self) -> None:
        """Accepts all values."""


def combination_problems(config: Config) -> list[str]:
    """A message for each contradiction between options."""
    c, problems = config, []

    def require(condition: bool, message: str) -> None:
        if not condition:
            problems.append("config: " + message)

    needs_momentum = {
        "--vote.pool momentum": c.vote.pool == "momentum",
        "--objective.momentum-in-loss": c.objective.momentum_in_loss,
    }
    for name, wanted in needs_momentum.items():
        require(c.rollout.num_momentum > 0 or not wanted, f"{name} needs --rollout.num-momentum of at least 1, got 0.")
    require(
        c.engine.placement == "one-engine" or c.rollout.num_momentum > 0 or len(c.engine.servers) == 1,
        "--rollout.num-momentum 0 needs one engine or one server.",
    )
    problems += engine_problems(c.engine) + (ahead_problems(c) if c.rollout.ahead else [])
    if isinstance(c.distributed.processes, int):
        problems += process_problems(c, c.distributed.processes)
    problems += adapter_problems(c.momentum) if c.lora.rank else []
    problems += stop_problems(c.rollout.stop)
    require(
        c.vote.num_train is None or c.vote.num_train <= c.rollout.num_policy,
        f"--vote.num-train must be at most --rollout.num-policy ({c.rollout.num_policy}), got {c.vote.num_train}.",
    )
    everyone = c.objective.momentum_in_loss or c.objective.advantage_over == "all"
    group = c.num_train + (c.rollout.num_momentum if everyone else 0)
    require(group >= 2, f"a prompt needs 2 rollouts to compare, got {group}. Raise --rollout.num-policy.")
    require(
        c.optim.num_minibatches <= c.rollout.num_prompts,
        f"--optim.num-minibatches must be at most {c.rollout.num_prompts} (--rollout.num-prompts), "
        f"got {c.optim.num_minibatches}.",
    )
    require(
        c.stop_after is None or c.stop_after <= c.steps,
        f"--stop-after must be at most --steps ({c.steps}), got {c.stop_after}.",
    )
    require(
        c.objective.kl_coef == 0 or c.objective.kl_reference != "none",
        "--objective.kl-coef above 0 needs --objective.kl-reference initial or momentum, got none.",
    )
    require(not c.resume or c.run_dir is not None, "--resume needs --run-dir.")
    require(
        c.dry_run_memory is None or read_bytes(c.dry_run_memory) is not None,
        f"--dry-run-memory must be a number of bytes such as 80GiB or 80GB, got {c.dry_run_memory}.",
    )
    require(c.dry_run or c.dry_run_memory is None, "--dry-run-memory needs --dry-run.")
    require(c.resume or not c.resume_extend, "--resume-extend needs --resume.")
    return problems


def adapter_problems(momentum: MomentumConfig) -> list[str]:
    """A message for each option of the momentum model that does not apply to a momentum adapter."""
    wanted = {"dtype": ("fp32", momentum.dtype), "device": ("same", momentum.device)}
    return [
        f"config: --momentum.{name} must be {fit} with LoRA, whose momentum model is a second adapter in the policy's "
        f"model, got {got}."
        for name, (fit, got) in wanted.items()
        if got != fit
    ]


def ahead_problems(config: Config) -> list[str]:
    """A message for each option that does not go with --rollout.ahead 1."""
    c, problems = config, []

    def refuse(condition: bool, needed: str) -> None:
        if condition:
            problems.append(f"config: --rollout.ahead 1 needs {needed}.")

    place = c.engine.placement
    refuse(place == "one-engine", f"--engine.placement two-engines or server, got {place}")
    refuse(
        len(c.engine.servers) == 1 and c.rollout.num_momentum > 0,
        "two --engine.servers, or --rollout.num-momentum 0: one server takes weights in the middle of a batch",
    )
    refuse(c.engine.sleep, "--engine.no-sleep: the engine is never idle")
    num_steps = c.optim.num_minibatches * c.optim.num_epochs
    refuse(
        num_steps > 1,
        f"one optimiser step a batch, each one more makes rollouts older, got {num_steps} "
        "(--optim.num-minibatches times --optim.num-epochs)",
    )
    return problems


def process_problems(config: Config, size: int) -> list[str]:
    """A message for each option that does not fit a number of processes."""
    c = config
    problems = world_problems(size, replicate=c.distributed.replicate, reduce=c.distributed.reduce)
    alone = {"--optim.offload": c.optim.offload, "--rollout.ahead": c.rollout.ahead > 0}
    for name, is_set in alone.items():
        if is_set and size > 1:
            problems.append(f"config: {name} needs one process, got {size}.")
    if c.engine.placement == "one-engine" and size % c.engine.tensor_parallel:
        problems.append(
            f"config: --engine.tensor-parallel must divide the number of processes ({size}), "
            f"got {c.engine.tensor_parallel}."
        )
    return problems


def engine_problems(engine: EngineConfig) -> list[str]:
    """A message for each contradiction between options of an engine."""
    c, problems = engine, []
    if c.name != "vllm" and c.placement != "one-engine":
        problems.append("config: --engine.placement needs --engine.name vllm.")
    if c.tensor_parallel > 1 and (c.name != "vllm" or c.placement == "server"):
        problems.append("config: --engine.tensor-parallel needs a vLLM engine that the run starts.")
    if len(c.servers) not in ((1, 2) if c.placement == "server" else (0,)):
        problems.append(
            f"config: --engine.servers must name 1 or 2 servers with --engine.placement server, otherwise none, "
            f"got {len(c.servers)}."
        )
    if len(c.devices) not in ((0, 2) if c.placement == "two-engines" else (0,)):
        problems.append(
            f"config: --engine.devices must name 2 devices, and only with --engine.placement two-engines, "
            f"got {len(c.devices)}."
        )
    if any({"@", "?"} & set(url) for url in c.servers):
        problems.append("config: --engine.servers must be URLs without user, password or query, got one with @ or ?.")
    elif not all(url.startswith(("http://", "https://")) for url in c.servers):
        given = " ".join(c.servers)
        problems.append(f"config: --engine.servers must be URLs such as http://127.0.0.1:8000, got {given}.")
    return problems


def stop_problems(texts: tuple[str, ...] | None) -> list[str]:
    """A message for each invalid stop text; a single empty one switches them off."""
    name, problems = "config: --rollout.stop", []
    for text in texts if texts and texts != ("",) else ():
        if not 0 < len(text) <= MAX_STOP_CHARS:
            problems.append(
                f"{name} must be texts of 1 to {MAX_STOP_CHARS} characters, or '' alone for none, got {len(text)}."
            )
        elif "\ufffd" in text or any("\ud800" <= c <= "\udfff" for c in text):
            problems.append(f"{name} must be text that a model can write, got {text!a}.")
    return problems
