"""Memory of a rank: arithmetic on the sizes of a model, of a batch and of the group of ranks.

Letters: P parameters, W ranks, S ranks that share one copy of the state, T tokens of a micro-batch, D hidden,
V vocabulary, c bytes of a number in forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from mgrpo.config import Config
from mgrpo.models.forward import MAX_LOGITS_BYTES
from mgrpo.models.measure import ModelSize
from mgrpo.training.trainer import needs_initial

# Bytes a parameter; Kahan compensation is a second bf16 number.
MOMENTUM_BYTES = {"fp32": 4, "bf16-stochastic": 2, "bf16-kahan": 4}
# Sampling holds logits, log-probs and probabilities in fp32 and a cumulative sum in fp64, for each sequence.
SAMPLING_BYTES = 20
# Gradients of the largest activations that are held at a time.
ACTIVATION_GRADIENTS = 3

Phase = Literal["start", "always", "rollout", "score", "update"]


class Part(NamedTuple):
    """A part of the memory of one rank."""

    name: str
    num_bytes: int
    phase: Phase = "always"
    on_host: bool = False
    once: bool = False  # of all ranks together


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the plan is made for."""

    size: ModelSize
    longest: int  # tokens of the longest prompt and the longest response together
    ranks: int  # W
    device_memory: int | None  # bytes of a GPU, of which vLLM takes a share
    on_gpu: bool = True
    adapter: int | None = None  # parameters of a LoRA adapter; the model's own are then frozen and shared


class Memory(NamedTuple):
    """The memory of one rank."""

    parts: list[Part]

    @property
    def device(self) -> int:
        """The most that the device holds at a time."""
        return self._peak([part for part in self.parts if not part.on_host])

    def host(self, ranks: int) -> int:
        """The most that the host of all ranks holds at a time, beside the devices."""
        return self.of_all(ranks, [part for part in self.parts if part.on_host])

    def of_all(self, ranks: int, parts: list[Part] | None = None) -> int:
        """The most that all ranks hold together, in one memory."""
        chosen = self.parts if parts is None else parts
        return self._peak([part if part.once else part._replace(num_bytes=ranks * part.num_bytes) for part in chosen])

    def _peak(self, parts: list[Part]) -> int:
        """What is held always and the largest of the phases; at the start little else than its own is held."""
        held = dict.fromkeys(("start", "always", "rollout", "score", "update"), 0)
        for part in parts:
            held[part.phase] += part.num_bytes
        start, always = held.pop("start"), held.pop("always")
        return max(start, always + max(held.values()))


def plan_memory(config: Config, job: Job) -> Memory:
    """The memory of one rank of a run."""
    parts = [*state_parts(config, job), *engine_parts(config, job), *pass_parts(config, job)]
    return Memory([part for part in parts if part.num_bytes])


def shards(config: Config, job: Job) -> int:
    """S, the ranks among which one copy of the state is divided."""
    return max(job.ranks // config.distributed.replicate, 1)


def compute_bytes(config: Config) -> int:
    """c, bytes of a number in forward passes."""
    return 2 if config.model.dtype == "bf16" else 4


def state_parts(config: Config, job: Job) -> list[Part]:
    """Weights, gradients, moments and momentum model, each divided by S."""
    c, share = config, shards(config, job)
    full = job.adapter is None
    frozen = 0 if full else -(-job.size.parameters // share)
    trained = -(-(job.size.parameters if job.adapter is None else job.adapter) // share)
    dtype, on_host = c.momentum.dtype, c.momentum.device == "cpu"
    momentum = MOMENTUM_BYTES[dtype] * trained
    published = full and c.engine.name == "vllm" and c.model.dtype == "bf16" and dtype == "fp32"
    saved = (12 * trained + momentum) * share * (c.checkpoint.background and c.checkpoint.every > 0)
    # Where no engine needs the whole model, each of several ranks reads its rows alone.
    loaded = 4 * job.size.parameters * (job.ranks == 1 or c.engine.name != "vllm")
    copied = 1 + (c.engine.name != "vllm") if full else c.model.dtype == "bf16"  # frozen weights are cast after that
    return [
        Part(f"frozen weights ({c.model.dtype})", compute_bytes(c) * frozen),
        Part("weights (fp32)", 4 * trained),
        Part("gradients (fp32)", 4 * trained),
        Part("AdamW moments (fp32)", 8 * trained, on_host=c.optim.offload),
        Part(f"momentum model ({dtype})", momentum, on_host=on_host),
        Part("momentum model, copy for the engine (bf16)", 2 * trained * published, on_host=on_host),
        Part(f"initial weights ({c.model.dtype})", compute_bytes(c) * trained * (full and needs_initial(c))),
        Part("copy of a checkpoint to write" + ", of all ranks" * (job.ranks > 1), saved, on_host=True, once=True),
        Part("whole weights (fp32)", loaded * job.on_gpu, "start", on_host=True),
        Part(
            "whole weights and a copy for the engine (fp32)" if full else "loaded weights (fp32)",
            loaded * copied,
            "start",
        ),
    ]


def engine_parts(config: Config, job: Job) -> list[Part]:
    """Weights and KV cache of the rollout engine; vLLM's are a share of the GPU."""
    c, size, number = config, job.size, compute_bytes(config)
    weights = number * size.parameters
    if c.engine.name == "vllm":
        return _vllm_parts(c, job, weights)
    sequences = decoded_together(c, job)
    # In one process the frozen weights are shared, and in fp32 the trained ones; a momentum model stored otherwise is
    # copied.
    shared = job.ranks == 1 and (number == 4 or job.adapter is not None)
    copied = shared and _stored_otherwise(c)
    cache = number * size.cache_numbers * job.longest * sequences
    return [
        Part(f"engine: weights ({c.model.dtype})", 0 if shared else weights),
        Part("engine: weights of the momentum model (fp32)", weights * copied, "rollout"),
        Part(f"engine: KV cache of {sequences} x {job.longest:,} tokens", cache, "rollout"),
        Part("engine: sampling", SAMPLING_BYTES * size.vocabulary * sequences, "rollout"),
    ]


def decoded_together(c: Config, job: Job) -> int:
    """The most sequences that the embedded engine decodes together: of rollouts, evaluation or retention."""
    per_call = max(c.rollout.num_policy, c.rollout.num_momentum)
    prompts = min(max(c.engine.batch_size // per_call, 1), -(-c.rollout.num_prompts // job.ranks))
    tracked = c.monitor.retention_prompts if c.monitor.retention_every else 0
    evaluated = c.engine.batch_size if c.data.probe and c.eval.every else 0
    return min(max(prompts * per_call, tracked, evaluated), c.engine.batch_size)


def _vllm_parts(c: Config, job: Job, weights: int) -> list[Part]:
    """Memory of vLLM on the trainer's device, or of the weights on their way to engines elsewhere."""
    if c.engine.servers or c.engine.devices:
        name = "weights on their way to vLLM" + ", of rank 0" * (job.ranks > 1)
        return [Part(name, weights, "rollout", on_host=True, once=True)]
    weights //= c.engine.tensor_parallel
    engines = 2 if c.engine.placement == "two-engines" else 1
    if c.engine.kv_cache_gib or not job.on_gpu or job.device_memory is None:
        cache = int((c.engine.kv_cache_gib or 1) * 2**30)
    else:
        cache = max(int(c.engine.gpu_memory * job.device_memory) - weights, 0)
    phase: Phase = "rollout" if c.engine.sleep else "always"
    return [
        Part(f"vLLM: weights ({c.model.dtype})", engines * weights, phase),
        Part("vLLM: KV cache and buffers", engines * cache, phase),
        Part("vLLM: weights while it sleeps", engines * weights * c.engine.sleep, on_host=True),
    ]


def _stored_otherwise(c: Config) -> bool:
    """Whether the momentum model has to be copied before the trainer's model can compute with it."""
    return c.rollout.num_momentum > 0 and (c.momentum.dtype != "fp32" or c.momentum.device == "cpu")


def pass_parts(config: Config, job: Job) -> list[Part]:
    """What the passes over one micro-batch add to the state."""
    c, size, share = config, job.size, shards(config, job)
    tokens = min(max(c.optim.micro_batch_tokens, job.longest), job.longest * num_rollouts(c))
    copied = _stored_otherwise(c) or (job.adapter is None and needs_initial(c) and c.model.dtype == "bf16")
    whole = _whole_weights(c, job, gradient=0)
    return [
        *(part._replace(phase="update") for part in _whole_weights(c, job, gradient=4)),
        *_activations(c, job, tokens),
        *_logits(c, size, tokens),
        Part("scoring: whole weights", sum(part.num_bytes for part in whole), "score"),
        Part("scoring: copy of another model (fp32)", copied * 4 * -(-size.parameters // share), "score"),
    ]


def num_rollouts(c: Config) -> int:
    """R, trajectories of a step."""
    return c.rollout.num_prompts * (c.rollout.num_policy + c.rollout.num_momentum)


def _whole_weights(c: Config, job: Job, *, gradient: int) -> list[Part]:
    """Weights gathered by FSDP, or cast to bf16 in one process, with `gradient` bytes of each number's gradient."""
    size, number, full = job.size, compute_bytes(c), job.adapter is None
    gradient *= full
    beside = " and gradient" * (gradient > 0)
    if job.ranks == 1 and not full:  # frozen weights are in bf16 already
        return []
    if job.ranks == 1:
        casts = 2 * (number == 2)
        return [
            Part("layers cast to bf16", casts * size.layers),
            Part(f"head{beside}", (casts + gradient) * size.head),
        ]
    number = 4 if c.distributed.tree and full else number
    rest = size.parameters - size.layers - (0 if size.tied else size.embedding)
    return [
        Part(f"FSDP: two layers{beside}", (2 * number + gradient) * size.layer),
        Part(f"FSDP: norm and head{beside}", (number + gradient) * rest),
    ]


def _activations(c: Config, job: Job, tokens: int) -> list[Part]:
    """What the decoder keeps for its backward pass, and the gradients that pass through it."""
    kept, layers = job.size.activations, max(job.size.num_layers, 1)
    if kept is None:
        return []
    attention, packed = c.model.attn_implementation, c.optim.packing == "packed"
    # Attention weights of `eager`, and the mask of a packed row.
    pairs = tokens * (tokens if packed else job.longest) * (attention == "eager" or (packed and attention == "sdpa"))
    whole = tokens * kept.per_token + pairs * kept.per_token_pair
    name, found = f"activations of {tokens:,} tokens", whole
    if c.model.gradient_checkpointing:
        name, found = f"{name}, recomputed", (layers + 1) * tokens * kept.hidden + whole // layers
    return [
        Part(name, found, "update"),
        Part("gradients of activations", ACTIVATION_GRADIENTS * tokens * kept.largest, "update"),
    ]


def _logits(c: Config, size: ModelSize, tokens: int) -> list[Part]:
    """Logits in fp32 and their gradient; where the fused head takes their place, those of its largest exception."""
    logits = 4 * tokens * size.vocabulary
    if not size.has_plain_head:
        return [Part("logits and their gradient", 2 * logits, "update")]
    head = 4 * size.head * (c.model.dtype == "bf16")  # a copy in fp32, of which the logits are computed
    name = "logits and their gradient" if logits <= MAX_LOGITS_BYTES else "logits by the fused head, at most"
    return [Part(name, 2 * min(logits, MAX_LOGITS_BYTES) + head, "update")]
