"""One full update step of a random Qwen3 of 0.6 B shapes: the trainer's against plain transformers and torch.

    python -m bench.training.update_step [--device cuda] [--shapes tiny] [--out FILE]

Ours is `Learner.optimizer_step`: forward, log-probs and entropies from hidden states, clipped loss, backward, gradient
norm, AdamW, EMA. Plain is the step of a trainer without kernels: materialised logits, log_softmax and gather, entropy
without a gradient, the eager loss, the same AdamW, foreach EMA. Both keep fp32 weights and compute in bf16.
R trajectories, L response tokens of each, P prompt tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.harness.case import meter
from bench.kernels.eager import eager_grpo_loss
from mgrpo.algorithm.loss import Batch
from mgrpo.config import Config
from mgrpo.models.forward import Forward
from mgrpo.models.load import LoadedModel
from mgrpo.models.momentum import Momentum
from mgrpo.observe.timer import Timer
from mgrpo.presets import make_preset
from mgrpo.training.learner import Learner
from mgrpo.types import TrajectoryBatch

ROUNDS = 5
WARM_UPS = 2
LR = 1e-6


@dataclass(frozen=True)
class Shape:
    """A model and a batch."""

    trajectories: int
    response: int
    prompt: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int

    def __str__(self) -> str:
        return (
            f"{self.trajectories} x {self.response} tokens after {self.prompt}, {self.layers} layers, D={self.hidden}, "
            f"V={self.vocabulary}"
        )


SHAPES = {
    "cuda": Shape(8, 1_024, 32, 28, 1_024, 16, 8, 128, 3_072, 151_936),
    "tiny": Shape(4, 24, 4, 2, 64, 4, 2, 16, 128, 1_000),
}


@dataclass(frozen=True)
class Problem:
    """Inputs of both; each makes its own model from the same seed."""

    config: Config
    model: Qwen3ForCausalLM
    dtype: torch.dtype
    ids: Tensor  # [R, P + L], on the device
    trajectories: TrajectoryBatch
    advantage: Tensor  # [R]
    old_logprob: Tensor  # [R, L]

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of the forward."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.ids.device.type, self.dtype)


def make_model(shape: Shape, device: str) -> Qwen3ForCausalLM:
    """Random fp32 weights, tied head."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2 * (shape.prompt + shape.response),
        tie_word_embeddings=True,
        attention_dropout=0.0,
    )
    with torch.device(device):
        return Qwen3ForCausalLM(config).eval()


def make_problem(shape: Shape, device: str) -> Problem:
    """Random tokens; old log-probs near the model's, so that some ratios are clipped."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = make_model(shape, device)
    generator = torch.Generator().manual_seed(1)
    num, length = shape.trajectories, shape.response
    ids = torch.randint(shape.vocabulary, (num, shape.prompt + length), generator=generator)
    trajectories = TrajectoryBatch(
        prompts=ids[:, : shape.prompt].tolist(),
        tokens=ids[:, shape.prompt :],
        mask=torch.ones(num, length, dtype=torch.bool),
        rollout_logprob=torch.zeros(num, length),
        truncated=torch.zeros(num, 1, dtype=torch.bool),
        num_policy=1,
    )
    base = make_preset("arithmetic")
    config = replace(
        base,
        rollout=replace(base.rollout, max_new_tokens=length),
        optim=replace(base.optim, lr=LR, micro_batch_tokens=num * (shape.prompt + length)),
    )
    forward = _forward(config, _loaded(model, dtype))
    now = forward.run(model, trajectories).logprob
    old = now + 0.3 * torch.randn(num, length, generator=generator)
    advantage = torch.tensor([1.0, -1.0]).repeat(num)[:num]
    return Problem(config, model, dtype, ids.to(device), replace(trajectories, rollout_logprob=old), advantage, old)


def _loaded(model: Qwen3ForCausalLM, dtype: torch.dtype) -> LoadedModel:
    return LoadedModel(model=model, tokenizer=None, eos_ids=(0,), pad_id=0, context_length=2**20, dtype=dtype)


def _forward(config: Config, loaded: LoadedModel) -> Forward:
    return Forward(loaded, temperature=1.0, kernels=config.kernels, micro_batch_tokens=config.optim.micro_batch_tokens)


def ours(problem: Problem) -> Callable[[], dict[str, float]]:
    """The trainer's own step."""
    config, model = problem.config, problem.model
    loaded = _loaded(model, problem.dtype)
    momentum = Momentum(model, config.momentum, seed=0, kernels=config.kernels)
    learner = Learner(config, loaded, momentum, _forward(config, loaded), Timer())
    batch = Batch(
        mask=problem.trajectories.mask,
        advantage=problem.advantage,
        old_logprob=problem.old_logprob,
        rollout_logprob=problem.old_logprob,
        ref_logprob=None,
    )
    rows = torch.arange(len(problem.advantage))

    def step() -> dict[str, float]:
        found, _ = learner.optimizer_step(problem.trajectories, batch, rows)
        return {"loss": found["loss"], "grad_norm": found["grad_norm"]}

    return step


def plain(problem: Problem) -> Callable[[], dict[str, float]]:
    """The same step of transformers and torch alone."""
    model, ids = problem.model, problem.ids
    device, length = ids.device, problem.old_logprob.shape[1]
    old, advantage = problem.old_logprob.to(device), problem.advantage[:, None].to(device)
    mask = torch.ones_like(old)
    optim = problem.config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay
    )
    weights: list[Tensor] = list(model.parameters())
    momentum = [weight.detach().clone() for weight in weights]
    decay = problem.config.momentum.decay

    def step() -> dict[str, float]:
        optimizer.zero_grad(set_to_none=True)
        with problem.autocast():
            logits = model(input_ids=ids, use_cache=False).logits
        logps = logits[:, -length - 1 : -1].float().log_softmax(-1)
        logprob = logps.gather(-1, ids[:, -length:, None]).squeeze(-1)
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(-1).mean()
        loss = eager_grpo_loss(logprob, old, advantage, mask)
        del logits, logps
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, optim.grad_clip)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(momentum, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        return {"loss": float(loss.detach()), "grad_norm": float(norm), "entropy": float(entropy)}

    return step


def measure(make: Callable[[Problem], Callable[[], dict[str, float]]], shape: Shape, device: str) -> dict[str, Any]:
    """Milliseconds of a step, device idle at both ends, and peak memory; the first step's loss and gradient norm."""
    used = meter(device)
    problem = make_problem(shape, device)
    step = make(problem)
    first = step()
    for _ in range(WARM_UPS - 1):
        step()
    times = []
    for _ in range(ROUNDS):
        _synchronize(device)
        start = time.perf_counter()
        step()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    _, memory = used.with_memory(step)
    held = torch.cuda.memory_allocated() if device == "cuda" else None
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "ms": median(times) * 1e3,
        "ms_min": min(times) * 1e3,
        "peak_mib": None if peak is None else peak / 2**20,
        "held_mib": None if held is None else held / 2**20,
        "over_held_mib": None if memory.peak is None else memory.peak / 2**20,
        **first,
    }


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def run(device: str, scale: str) -> dict[str, Any]:
    """Runs both, one after the other, so that each has all the memory; a failure is part of the result."""
    shape = SHAPES[scale]
    found: dict[str, Any] = {"shape": str(shape), "device": meter(device).describe()}
    for name, make in (("ours", ours), ("plain", plain)):
        try:
            found[name] = measure(make, shape, device)
        except RuntimeError as error:  # out of memory, or a kernel that does not launch
            found[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        meter(device).free()
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The result as text."""
    text = [f"update step, {found['shape']}"]
    for name in ("ours", "plain"):
        row = found[name]
        if "failed" in row:
            text.append(f"  {name:6s} failed: {row['failed']}")
            continue
        peak = "" if row["peak_mib"] is None else f", peak {row['peak_mib']:,.0f} MiB"
        over = "" if row["over_held_mib"] is None else f", {row['over_held_mib']:,.0f} MiB over what it holds"
        text.append(
            f"  {name:6s} {row['ms']:,.1f} ms (least {row['ms_min']:,.1f}){peak}{over}; "
            f"first loss {row['loss']:.6f}, gradient norm {row['grad_norm']:.4f}"
        )
    if all("ms" in found[name] for name in ("ours", "plain")):
        text.append(f"  plain / ours: time {found['plain']['ms'] / found['ours']['ms']:.2f}x")
    return text


def main() -> int:
    """Runs both; returns 1 if ours fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", choices=tuple(SHAPES), help="default: cuda on a GPU, else tiny")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    found = run(args.device, args.shapes or ("cuda" if args.device == "cuda" else "tiny"))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(lines(found)))
    return int("failed" in found["ours"])


if __name__ == "__main__":
    sys.exit(main())
