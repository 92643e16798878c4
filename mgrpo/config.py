"""The configuration of a run: frozen dataclasses, one group a concern, documented field by field.

Letters: B prompts a step, M policy rollouts and N momentum rollouts a prompt, G = M + N.
`Config` checks itself and lists every problem at once. Presets are functions in presets.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from mgrpo.errors import ConfigError


def _at_home(kind: Any, metavar: str) -> Any:
    """How the command lines read a path: `~` and `~user` at its start mean a home folder, as in a shell."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: kind(os.path.expanduser(words[0])),
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


HomeText = Annotated[str, _at_home(str, "STR")]
"""A path, or a name of another kind, which never begins with `~`."""
HomePath = Annotated[Path, _at_home(Path, "PATH")]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy."""

    path: HomeText = "builtin:arithmetic"
    """Folder or hub id of a transformers causal LM; `builtin:arithmetic` is the base model shipped with the package."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of forward passes and rollouts. Master weights and optimiser state are always fp32."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention of transformers. Families that have no `sdpa` take `eager` in its place."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Allow a model folder to run its own code."""
    device: str = "auto"
    """`auto` takes a GPU where there is one; or `cpu`, `cuda`, `cuda:1`."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts. Labels, where there are any, feed metrics only (and reward `labels`)."""

    train: HomeText = "arithmetic:8192:3-7:0"
    """.jsonl, .json, .parquet, .csv, .tsv or .arrow file, text also as .gz; a folder of them or of `save_to_disk`; a
    hub id, `ID:NAME` for one of its configurations; or `arithmetic:NUM:OPERANDS:SEED`."""
    probe: HomeText | None = None
    """Labelled prompts for evaluation during training, same forms as `train`."""
    prompt_key: str = "prompt"
    """Key of the prompt in a record: text, or a list of chat messages. `a.b` is the key `b` of the object `a`."""
    answer_key: str | None = None
    """Key of the true answer in a record, likewise. None is `answer`, which may be missing; a key that is given and
    that no record has is an error."""
    split: str = "train"
    """Split of a hub data set, of a saved DatasetDict, or of a folder whose files are named by splits."""
    template: str | None = None
    """None takes prompts as they are, `chat` the tokenizer's chat template; else a text that holds `{prompt}`."""
    template_args: tuple[str, ...] = ()
    """KEY=VALUE ... for the chat template, such as `enable_thinking=false`."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with prompts that leave no room for a response in the model's context. They are never cut."""


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How an answer is read from a response and compared."""

    extract: str = "boxed"
    """`boxed` (last \\boxed{} with content), `hash` (after the last ####), `last-number`, `regex:PATTERN` (last match,
    group 1). What stands before the end of a thought (`</think>`) is not read."""
    label_extract: str = "auto"
    """How the true answer is read from a label, whatever responses look like: `auto` (last box, else the line after
    ####, else <answer> tags or what "the answer is" at its end, else the label itself), `plain` (the label itself),
    `boxed`, `hash`, `last-number`, `regex:PATTERN`. Labels of the built-in problems are plain."""
    equivalence: Literal["math", "exact"] = "math"
    """`math` decides by math-verify in worker processes, `exact` by normalised text alone."""
    timeout_s: float = 5.0
    """Limit of one math-verify comparison in seconds of processor time; past it two answers count as different."""
    workers: int | None = None
    """Processes that compare answers, each about 100 MB; they start when first needed. As many as this process may use
    cores, at most 8, when None."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sampling of responses."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """`transformers` decodes with the trainer's own model; `vllm` with an engine beside it (pip install vllm)."""
    prompts: int = 16
    """B, prompts a step."""
    policy: int = 12
    """M, rollouts a prompt from the policy."""
    momentum: int = 4
    """N, rollouts a prompt from the momentum model. 0 is plain self-reward."""
    temperature: float = 1.0
    """Sampling temperature; every log-prob and entropy is taken at it."""
    top_p: float = 1.0
    """Nucleus sampling; 1 is off."""
    max_new_tokens: int = 64
    """Longest response in tokens, EOS included."""
    stop: tuple[str, ...] | None = None
    """Texts that end a response, the first of them; `\\n` stands for a newline. The answer is read from what is before.
    None takes the label ahead of the prompt in a `data.template` of text, as '\\nQuestion:'; '' is none."""
    truncated: Literal["train", "mask"] = "train"
    """Whether a rollout cut at the length limit trains, or only votes."""
    batch_size: int = 256
    """Most sequences decoded together; bounds the KV cache. vLLM decides this itself."""
    placement: Literal["one-engine", "two-engines", "server"] = "one-engine"
    """Where vLLM runs: in this process, momentum and then policy; in two processes started here, both at once; or in
    servers that run already."""
    servers: tuple[str, ...] = ()
    """URLs of one vLLM server, or of two: for the policy and for the momentum model."""
    devices: tuple[str, ...] = ()
    """CUDA devices of the two engines, policy first, as CUDA_VISIBLE_DEVICES names them; none leaves them all."""
    weights_host: str = "127.0.0.1"
    """Address of this machine under which servers fetch weights."""
    transfer: Literal["http", "nccl"] = "http"
    """How weights reach other processes: `http` anywhere, `nccl` from GPU to GPU by vLLM's own transfer."""
    timeout_s: float = 600.0
    """Longest time of vLLM without a finished prompt, in seconds; past it the engine counts as hung."""
    sleep: bool = False
    """vLLM leaves the GPU's memory to the trainer between rollouts; its weights wait on the host."""
    gpu_memory: float = 0.4
    """Share of a GPU's memory for vLLM, its weights included."""
    kv_cache_gib: float | None = None
    """KV cache of vLLM in GiB; None is what `gpu-memory` leaves, and 1 GiB on a CPU."""
    parity_every: int = 50
    """Steps between comparisons of the engine's log-probs with the trainer's, which the first two steps make anyway."""


@dataclass(frozen=True, kw_only=True)
class MomentumConfig:
    """The momentum model: theta_k <- m theta_k + (1 - m) theta_q."""

    decay: float = 0.99
    """m, share of the old weights kept at an update. 0 copies the policy, 1 freezes the initial model."""
    schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` moves 1 - m from 1 - decay to 1 - final-decay over the run."""
    final_decay: float = 0.9999
    """m at the end of the cosine schedule."""
    every: int = 1
    """Optimiser steps between updates."""
    dtype: Literal["fp32", "bf16-stochastic", "bf16-kahan"] = "fp32"
    """Storage. Plain bf16 is not offered: at these rates it does not move."""
    device: Literal["same", "cpu"] = "same"
    """Where the weights live."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """IQR filter: drops trajectories with entropy below Q1 - k (Q3 - Q1)."""

    k: float = 0.75
    """Factor of the interquartile range."""
    scope: Literal["batch", "prompt"] = "batch"
    """Quartiles over all trajectories of the batch, or over the G of each prompt."""
    applies_to: Literal["vote-and-loss", "loss", "none"] = "vote-and-loss"
    """What a dropped trajectory leaves; `none` switches the filter off."""
    two_sided: bool = False
    """Also drop above Q3 + k (Q3 - Q1)."""
    entropy: Literal["mean", "sum"] = "mean"
    """Trajectory entropy: mean or sum of the token entropies."""
    score: Literal["policy", "source"] = "policy"
    """Model whose entropy counts: the policy, or the one that wrote the trajectory."""


@dataclass(frozen=True, kw_only=True)
class VoteConfig:
    """Majority vote, the pseudo-label."""

    pool: Literal["both", "policy", "momentum"] = "both"
    """Whose rollouts vote."""
    momentum_weight: int = 1
    """Votes of one momentum rollout."""
    min_share: float = 0.0
    """A prompt whose majority holds a smaller share of the votes gives no signal."""
    min_margin: float = 0.0
    """A prompt whose majority leads the second answer by a smaller share gives no signal."""
    num_train: int | None = None
    """How many of the M policy rollouts train; all of them when None."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Reward, advantage and loss."""

    reward: Literal["majority", "soft", "labels", "self-certainty", "entropy"] = "majority"
    """1 for the pseudo-label, share of the own class, 1 for the true answer, self-certainty, or negative entropy."""
    advantage: Literal["std", "mean", "leave-one-out", "sign"] = "std"
    """Group advantage: (r - mean) / std, r - mean (Dr.GRPO), leave-one-out (RLOO), or 2 r - 1."""
    advantage_over: Literal["trained", "all"] = "trained"
    """Rollouts whose rewards make the mean and the deviation: those that train, or all G that the filter left."""
    clip_low: float = 0.2
    """Lower clip of the ratio, 1 - clip-low."""
    clip_high: float = 0.2
    """Upper clip of the ratio, 1 + clip-high."""
    dual_clip: float | None = None
    """Bound of the loss at negative advantage, above 1; None is off."""
    kl_coef: float = 0.005
    """Weight of the KL to the reference."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """KL estimator."""
    kl_reference: Literal["initial", "momentum", "none"] = "initial"
    """Reference of the KL."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio per token, or per sequence (GSPO)."""
    reduce: Literal["token-mean", "sequence-mean-token-mean", "constant"] = "token-mean"
    """Normaliser of the loss: response tokens, sequences, or sequences times max-new-tokens (Dr.GRPO)."""
    tis_cap: float = 2.0
    """Cap of the truncated importance weight between trainer and rollout engine."""
    momentum_in_loss: bool = False
    """Momentum rollouts train too, weighted by min(pi_policy / pi_momentum, tis-cap)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    kl_cov: float = 0.0
    """Share of tokens, those of highest log-prob/advantage covariance, that get a KL penalty in place of the clip."""
    kl_cov_coef: float = 1.0
    """Weight of the KL-Cov penalty."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW on fp32 master weights."""

    lr: float = 1e-6
    """Peak learning rate."""
    warmup_ratio: float = 0.1
    """Share of the optimiser steps spent on linear warm-up."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up; `cosine` falls to zero."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    micro_batch_tokens: int = 16384
    """Most padded tokens in one forward pass; changes memory and time, not the gradient."""
    num_minibatches: int = 1
    """Optimiser steps a pass over the rollout batch."""
    num_epochs: int = 1
    """Passes over the rollout batch."""
    max_nonfinite: int = 5
    """Non-finite optimiser steps in a row that stop the run."""


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Tensor operations."""

    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Backend of mgrpo_kernels: "auto" takes the first that a device and a dtype have."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints."""

    every: int = 50
    """Steps between checkpoints; 0 saves only at the end."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 1
    """Best checkpoints kept besides: by probe accuracy; without a probe, the last from well before any alarm."""
    background: bool = True
    """Write while training goes on, from a copy of the state in the host's memory."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the probe during training."""

    every: int = 25
    """Steps between evaluations; 0 is never."""
    samples: int = 4
    """Sampled responses a prompt, beside the greedy one."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Logging."""

    backends: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Trackers beside metrics.jsonl."""
    samples: int = 0
    """Rollouts of the first prompts written to samples/ and shown, at every evaluation step."""
    kl_initial_every: int = 0
    """Steps between measurements of the KL to the initial model; 0 is never."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Collapse monitor. It reads no label except through the probe."""

    on_collapse: Literal["warn", "stop", "rollback"] = "warn"
    """What an alarm does; `rollback` goes back to the last good checkpoint and on with other prompts."""
    max_rollbacks: int = 2
    """Rollbacks of a run; the alarm after that many stops it."""
    window: int = 10
    """Steps averaged before a signal is judged."""
    top_answer_share: float = 0.3
    """Alarm when this share of different prompts gets one and the same answer, and twice what it was at the start."""
    agreement_drop: float = 0.3
    """Alarm when policy and momentum elect the same answer for a share of prompts this far below its best, and farther
    than chance explains."""
    unparseable_share: float = 0.5
    """Alarm when this share of rollouts has no answer, and twice what it was at the start."""
    retention_drop: float = 0.12
    """Alarm when this share of the answers that the model was sure of at the start has changed; twice this share where
    momentum rollouts vote, for such a run may stray and come back."""
    retention_prompts: int = 160
    """Training prompts asked for such answers, in the first steps."""
    retention_every: int = 20
    """Steps between greedy repetitions of these prompts, a quarter as many once answers slip; 0 never asks."""
    length_change: float = 2.0
    """Alarm when responses are this many times longer or shorter than at the start."""
    probe_drop: float = 0.1
    """Alarm when probe accuracy is this far below its best."""

    def most_changed(self, *, anchored: bool) -> float:
        """Share of sure answers that may change, in a run with momentum rollouts (`anchored`) or without."""
        return min(self.retention_drop * (2 if anchored else 1), 1.0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    preset: Annotated[str, tyro.conf.Suppress] = "arithmetic"
    """Name of the preset that this configuration started from."""
    run_dir: HomeText | None = None
    """Directory of the run; runs/PRESET-TIME when None."""
    steps: int = 200
    """Rollout batches of the whole run; the schedules span them."""
    seed: int = 0
    """Seed of data order and sampling."""
    threads: int | None = None
    """CPU threads; when None torch's choice, at most the CPUs that affinity and cgroups leave. A run repeats bit for
    bit only with the same number."""
    stop_after: int | None = None
    """End early, after this step, under the schedule of `steps`."""
    resume: bool = False
    """Continue from the newest valid checkpoint of run-dir."""
    resume_extend: bool = False
    """With --resume, allow another --steps than the run was started with."""
    dry_run: bool = False
    """Check everything, print the plan, load the model and try a token, a gradient and a save, and exit."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    vote: VoteConfig = field(default_factory=VoteConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        """Raises ConfigError with every problem."""
        problems = _range_problems(self) + _combination_problems(self)
        if problems:
            raise ConfigError(problems)

    @property
    def num_train(self) -> int:
        """Policy rollouts a prompt that train."""
        return self.rollout.policy if self.vote.num_train is None else self.vote.num_train

    @property
    def num_optimizer_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps * self.optim.num_minibatches * self.optim.num_epochs


MAX_STOP_CHARS = 1000

# field: (low, high, low included, high included)
_RANGES: dict[str, tuple[float, float, bool, bool]] = {
    "steps": (1, math.inf, True, False),
    "seed": (0, 2**31, True, False),
    "threads": (1, 4096, True, True),
    "stop_after": (1, math.inf, True, False),
    "answer.timeout_s": (0, math.inf, False, False),
    "answer.workers": (1, 1024, True, True),
    "rollout.prompts": (1, math.inf, True, False),
    "rollout.policy": (1, math.inf, True, False),
    "rollout.momentum": (0, math.inf, True, False),
    "rollout.temperature": (0, math.inf, False, False),
    "rollout.top_p": (0, 1, False, True),
    "rollout.max_new_tokens": (1, math.inf, True, False),
    "rollout.batch_size": (1, math.inf, True, False),
    "rollout.gpu_memory": (0, 1, False, True),
    "rollout.timeout_s": (0, math.inf, False, False),
    "rollout.kv_cache_gib": (0, math.inf, False, False),
    "rollout.parity_every": (0, math.inf, True, False),
    "momentum.decay": (0, 1, True, True),
    "momentum.final_decay": (0, 1, True, True),
    "momentum.every": (1, math.inf, True, False),
    "filter.k": (0, math.inf, True, False),
    "vote.momentum_weight": (1, 10**6, True, True),
    "vote.min_share": (0, 1, True, True),
    "vote.min_margin": (0, 1, True, True),
    "vote.num_train": (1, math.inf, True, False),
    "objective.clip_low": (0, 1, True, True),
    "objective.clip_high": (0, math.inf, True, False),
    "objective.dual_clip": (1, math.inf, False, False),
    "objective.kl_coef": (0, math.inf, True, False),
    "objective.tis_cap": (0, math.inf, False, True),
    "objective.entropy_coef": (-math.inf, math.inf, False, False),
    "objective.kl_cov": (0, 1, True, True),
    "objective.kl_cov_coef": (0, math.inf, True, False),
    "optim.lr": (0, math.inf, True, False),
    "optim.warmup_ratio": (0, 1, True, False),
    "optim.weight_decay": (0, math.inf, True, False),
    "optim.beta1": (0, 1, True, False),
    "optim.beta2": (0, 1, True, False),
    "optim.grad_clip": (0, math.inf, False, True),
    "optim.micro_batch_tokens": (1, math.inf, True, False),
    "optim.num_minibatches": (1, math.inf, True, False),
    "optim.num_epochs": (1, math.inf, True, False),
    "optim.max_nonfinite": (1, math.inf, True, False),
    "checkpoint.every": (0, math.inf, True, False),
    "checkpoint.keep_last": (1, math.inf, True, False),
    "checkpoint.keep_best": (0, math.inf, True, False),
    "eval.every": (0, math.inf, True, False),
    "eval.samples": (1, math.inf, True, False),
    "log.samples": (0, math.inf, True, False),
    "log.kl_initial_every": (0, math.inf, True, False),
    "monitor.window": (1, math.inf, True, False),
    "monitor.top_answer_share": (0, 1, False, True),
    "monitor.agreement_drop": (0, 1, False, True),
    "monitor.unparseable_share": (0, 1, False, True),
    "monitor.length_change": (1, math.inf, False, False),
    "monitor.probe_drop": (0, 1, False, True),
    "monitor.retention_drop": (0, 1, False, True),
    "monitor.retention_prompts": (1, math.inf, True, False),
    "monitor.retention_every": (0, math.inf, True, False),
    "monitor.max_rollbacks": (0, math.inf, True, False),
}


def flag(name: str) -> str:
    """Spells a dotted field name as its command-line flag."""
    return "--" + name.replace("_", "-")


def _range_problems(config: Config) -> list[str]:
    """Lists the numbers outside their ranges."""
    problems = []
    for name, (low, high, low_included, high_included) in _RANGES.items():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        if value is None:
            continue
        above = value >= low if low_included else value > low
        below = value <= high if high_included else value < high
        if not (above and below):
            interval = f"{'[' if low_included else '('}{low:g}, {high:g}{']' if high_included else ')'}"
            problems.append(f"config: {flag(name)} must be in {interval}, got {value}.")
    return problems


def _combination_problems(config: Config) -> list[str]:
    """Lists the options that contradict one another."""
    c, problems = config, []

    def require(condition: bool, message: str) -> None:
        if not condition:
            problems.append("config: " + message)

    needs_momentum = {
        "--vote.pool momentum": c.vote.pool == "momentum",
        "--objective.momentum-in-loss": c.objective.momentum_in_loss,
    }
    for name, wanted in needs_momentum.items():
        require(c.rollout.momentum > 0 or not wanted, f"{name} needs --rollout.momentum of at least 1, got 0.")
    vllm = c.rollout.engine == "vllm"
    require(vllm or c.rollout.placement == "one-engine", "--rollout.placement needs --rollout.engine vllm.")
    require(
        len(c.rollout.servers) in ((1, 2) if c.rollout.placement == "server" else (0,)),
        f"--rollout.servers must name 1 or 2 servers with --rollout.placement server and none else, "
        f"got {len(c.rollout.servers)}.",
    )
    require(
        len(c.rollout.devices) in ((0, 2) if c.rollout.placement == "two-engines" else (0,)),
        f"--rollout.devices must name 2 devices, and that with --rollout.placement two-engines, "
        f"got {len(c.rollout.devices)}.",
    )
    require(
        c.rollout.placement == "one-engine" or c.rollout.momentum > 0 or len(c.rollout.servers) == 1,
        "--rollout.momentum 0 needs one engine or one server.",
    )
    has_secret = any({"@", "?"} & set(url) for url in c.rollout.servers)
    require(not has_secret, "--rollout.servers must be URLs without user, password or query, got one with @ or ?.")
    require(
        has_secret or all(url.startswith(("http://", "https://")) for url in c.rollout.servers),
        f"--rollout.servers must be URLs such as http://127.0.0.1:8000, got {' '.join(c.rollout.servers)}.",
    )
    problems += stop_problems(c.rollout.stop)
    require(
        c.vote.num_train is None or c.vote.num_train <= c.rollout.policy,
        f"--vote.num-train must be at most --rollout.policy ({c.rollout.policy}), got {c.vote.num_train}.",
    )
    everyone = c.objective.momentum_in_loss or c.objective.advantage_over == "all"
    group = c.num_train + (c.rollout.momentum if everyone else 0)
    require(group >= 2, f"a prompt needs 2 rollouts to compare, got {group}. Raise --rollout.policy.")
    require(
        c.optim.num_minibatches <= c.rollout.prompts,
        f"--optim.num-minibatches must be at most {c.rollout.prompts} (--rollout.prompts), "
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
    require(c.resume or not c.resume_extend, "--resume-extend needs --resume.")
    return problems


def stop_problems(texts: tuple[str, ...] | None, name: str = "config: --rollout.stop") -> list[str]:
    """Lists what is wrong with stop texts; a single empty one switches them off."""
    problems = []
    for text in texts if texts and texts != ("",) else ():
        if not 0 < len(text) <= MAX_STOP_CHARS:
            problems.append(
                f"{name} must be texts of 1 to {MAX_STOP_CHARS} characters, or '' alone for none, got {len(text)}."
            )
        elif "\ufffd" in text or any("\ud800" <= c <= "\udfff" for c in text):
            problems.append(f"{name} must be text that a model can write, got {text!a}.")
    return problems


def to_dict(config: Config) -> dict[str, Any]:
    """Turns a configuration into JSON-able data."""
    return dataclasses.asdict(config)


def from_dict(data: dict[str, Any]) -> Config:
    """Builds a configuration from `to_dict` data; an unknown key fails and names the nearest one."""
    return _build(Config, data, "")


def _build(cls: Any, data: Any, where: str) -> Any:
    """Builds one dataclass, recursively."""
    if not isinstance(data, dict):
        raise ConfigError([f"config: {where.rstrip('.') or 'the file'} must be an object, got {data!r}."])
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f" Did you mean {where}{near[0]}?" if near else ""
            raise ConfigError([f"config: {where}{key} is not a known key.{hint}"])
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, f"{where}{key}.")
        else:
            values[key] = _coerce(hints[key], value, where + key)
    return cls(**values)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Checks one value against its type; JSON lists become tuples and whole numbers floats."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal and value in options:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_coerce(options[0], item, where) for item in value)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _coerce(next(option for option in options if option is not type(None)), value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    expected = " | ".join(map(str, options)) if options else getattr(hint, "__name__", hint)
    raise ConfigError([f"config: {where} must be {expected}, got {value!r}."])
