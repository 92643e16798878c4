"""Seconds of a training step from bytes, FLOPs and link speeds: `python -m bench.training.cost_model`.

A model of costs, not a measurement: every share of a peak is an assumption, listed by `assumptions`, that a run on GPUs
can contradict. Letters: P parameters, W GPUs, S GPUs that share one copy of the state, t GPUs an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import ceil

from bench.cli import docstrings


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder."""

    name: str
    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def cache_bytes(self) -> int:
        """KV cache of a token in bf16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def attention_flops(self, length: float) -> float:
        """FLOPs of causal attention over a sequence, forward: two products of half a square."""
        return 2 * self.layers * self.heads * self.head_dim * length**2


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Speeds of an H100 SXM and its node by data sheet, and the share of each that is assumed to be reached."""

    flops: float = 989e12
    """FLOP/s in bf16, dense."""
    hbm: float = 3.35e12
    """Bytes/s of GPU memory."""
    nvlink: float = 450e9
    """Bytes/s from a GPU to the others of its node."""
    network: float = 8 * 50e9
    """Bytes/s out of a node: 400 Gb/s InfiniBand for each of its 8 GPUs."""
    node: int = 8
    """GPUs a node."""
    update_share: float = 0.40
    """Share of `flops` in passes of the trainer."""
    prefill_share: float = 0.50
    """Share of `flops` in prefill and in large decode batches."""
    decode_share: float = 0.60
    """Share of `hbm` while decoding."""
    sweep_share: float = 0.80
    """Share of `hbm` in AdamW and EMA."""
    link_share: float = 0.70
    """Share of `nvlink` and `network` in collectives."""
    decode_overhead_s: float = 2e-3
    """Seconds of a decode step beside its bytes: scheduling, sampling, launches."""
    reduction_s: float = 15e-6
    """Seconds of an all-reduce among the GPUs of an engine; two for each layer and decode step."""
    fixed_s: float = 3.0
    """Seconds of a step for everything else: grading, exchange of trajectories, metrics."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step."""

    prompts: int
    policy: int = 24
    momentum: int = 8
    prompt_tokens: int = 150
    mean_response: int = 1200
    longest_response: int = 3072
    micro_batch: int = 16384
    scored: int = 2
    """Forward passes over all rollouts before the update: policy and initial model."""

    @property
    def rollouts(self) -> int:
        """Rollouts of a step."""
        return self.prompts * (self.policy + self.momentum)

    @property
    def length(self) -> int:
        """Mean tokens of a sequence."""
        return self.prompt_tokens + self.mean_response


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model on a number of GPUs."""

    model: Model
    gpus: int
    shards: int
    """S."""
    engine_gpus: int
    """t."""
    work: Work
    lora: int = 0
    """Parameters of the adapters; 0 trains all weights."""


def generate_s(s: Setup, h: Hardware) -> float:
    """Rollouts of the momentum model, then of the policy: each decode step reads the weights and the cache."""
    engines = s.gpus / s.engine_gpus
    w, total = s.work, 0.0
    for per_prompt in (w.momentum, w.policy):
        sequences = w.prompts * per_prompt / engines
        alive = sequences * w.mean_response / w.longest_response  # on average
        cached = alive * (w.prompt_tokens + w.mean_response / 2) * s.model.cache_bytes
        read_s = (2 * s.model.parameters + cached) / s.engine_gpus / (h.hbm * h.decode_share)
        compute_s = 2 * s.model.parameters * alive / s.engine_gpus / (h.flops * h.prefill_share)
        reduce_s = 2 * s.model.layers * h.reduction_s * (s.engine_gpus > 1)
        prefill = 2 * s.model.parameters * w.prompts / engines * w.prompt_tokens
        total += w.longest_response * (max(read_s, compute_s) + reduce_s + h.decode_overhead_s)
        total += prefill / s.engine_gpus / (h.flops * h.prefill_share)
    return total


def link(s: Setup, h: Hardware) -> float:
    """Bytes/s of a ring over the GPUs that share the state: bound by NVLink, or by what leaves a node."""
    return h.link_share * (h.nvlink if s.shards <= h.node else min(h.nvlink, h.network))


def publish_s(s: Setup, h: Hardware) -> float:
    """Both models gathered from their shards in bf16 and given to the engine; adapters alone with LoRA."""
    return 2 * 2 * (s.lora or s.model.parameters) * (s.shards - 1) / s.shards / link(s, h)


def passes_s(s: Setup, h: Hardware, *, products: float, gathered: float) -> float:
    """Passes over all rollouts, computation and communication overlapped.

    Args:
        s: model and GPUs.
        h: speeds.
        products: forward passes that the FLOPs are worth.
        gathered: bytes a parameter that travel for each micro-batch.
    """
    w = s.work
    tokens, micro_batches = w.rollouts * w.length, ceil(w.rollouts * w.length / s.gpus / w.micro_batch)
    flops = products * (2 * s.model.parameters * tokens + w.rollouts * s.model.attention_flops(w.length))
    compute_s = flops / s.gpus / (h.flops * h.update_share)
    travel_s = micro_batches * gathered * s.model.parameters * (s.shards - 1) / s.shards / link(s, h)
    return max(compute_s, travel_s)


def score_s(s: Setup, h: Hardware) -> float:
    """Log-probs before the update; weights are gathered in bf16."""
    return passes_s(s, h, products=s.work.scored, gathered=2 * s.work.scored)


def update_s(s: Setup, h: Hardware) -> float:
    """Forward, recomputed forward and backward, which is worth two, or one without gradients of the weights.

    Weights are gathered twice in bf16, gradients reduced in fp32.
    """
    replicas = s.gpus // s.shards
    trained = s.lora or s.model.parameters
    # Between replicas each GPU's shard of the gradients is added once a step, over its own part of the network.
    between_s = 2 * 4 * trained / s.shards * (replicas - 1) / replicas / (h.link_share * h.network / h.node)
    return passes_s(s, h, products=3 if s.lora else 4, gathered=4 if s.lora else 8) + between_s


def optimizer_s(s: Setup, h: Hardware) -> float:
    """AdamW (28 bytes a parameter), EMA with its copy in bf16 (14), zero and norm of the gradient (8)."""
    return (28 + 14 + 8) * (s.lora or s.model.parameters) / s.shards / (h.hbm * h.sweep_share)


PHASES = {
    "generate": generate_s,
    "publish": publish_s,
    "score": score_s,
    "update": update_s,
    "AdamW, EMA": optimizer_s,
}

QWEN3_4B = Model(name="Qwen3-4B", parameters=4.02e9, layers=36, heads=32, kv_heads=8, head_dim=128)
QWEN3_32B = Model(name="Qwen3-32B", parameters=32.8e9, layers=64, heads=64, kv_heads=8, head_dim=128)
SETUPS = (
    Setup(model=QWEN3_4B, gpus=8, shards=8, engine_gpus=1, work=Work(prompts=8)),
    Setup(model=QWEN3_4B, gpus=64, shards=8, engine_gpus=1, work=Work(prompts=64)),
    Setup(model=QWEN3_32B, gpus=8, shards=8, engine_gpus=4, work=Work(prompts=8), lora=268_000_000),
    Setup(model=QWEN3_32B, gpus=64, shards=64, engine_gpus=4, work=Work(prompts=64)),
)


def assumptions(h: Hardware) -> Iterator[str]:
    """A Markdown table of the speeds and shares."""
    yield from ("| name | value | meaning |", "|---|---|---|")
    texts = docstrings(Hardware)
    for field in fields(h):
        yield f"| `{field.name}` | {getattr(h, field.name):.4g} | {texts[field.name]} |"
    for field in fields(Work):
        if field.name != "prompts":
            yield f"| `{field.name}` | {getattr(SETUPS[0].work, field.name):,} | of a step |"


def table(h: Hardware) -> Iterator[str]:
    """A Markdown table of seconds a step."""
    yield f"| model | GPUs | S | t | rollouts | {' | '.join(PHASES)} | rest | step, s | tokens/s a GPU |"
    yield "|---" * (len(PHASES) + 8) + "|"
    for s in SETUPS:
        seconds = [phase(s, h) for phase in PHASES.values()]
        total = sum(seconds) + h.fixed_s
        name = s.model.name + (f", LoRA of {s.lora / 1e6:.0f} M" if s.lora else "")
        cells = [name, s.gpus, s.shards, s.engine_gpus, f"{s.work.rollouts:,}"]
        cells += [f"{number:.1f}" for number in (*seconds, h.fixed_s, total)]
        cells.append(f"{s.work.rollouts * s.work.mean_response / total / s.gpus:,.0f}")
        yield "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    print(*assumptions(Hardware()), "", *table(Hardware()), sep="\n")
