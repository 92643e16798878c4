"""Makes rollouts.safetensors and metrics.json: ten steps of a small run on the shipped model, to be replayed.

The replay computes everything but the sampling: scores, filter, vote, advantages, loss, update and average. Run
`python tests/system/golden/make.py` after a deliberate change of the shipped model or of what a step computes, and look
at what changed in metrics.json.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mgrpo.config import (
    Config,
    DataConfig,
    EvalConfig,
    KernelsConfig,
    LogConfig,
    MomentumConfig,
    MonitorConfig,
    ObjectiveConfig,
    OptimConfig,
)
from mgrpo.models.tokenizer import resolve_path
from mgrpo.presets import make_preset
from mgrpo.rollout.build import start_engine
from mgrpo.rollout.engine import Engine
from mgrpo.training.trainer import Trainer
from mgrpo.types import Rollouts

ROLLOUTS = Path(__file__).with_name("rollouts.safetensors")
METRICS = Path(__file__).with_name("metrics.json")
STEPS = 10
KEYS = """loss grad_norm lr kl kl_initial reward_mean reward_mean_momentum majority_share tie_share vote_agreement
top_answer_share unparseable_share zero_signal_share pruned_share pruned_length kept_length truncated_share
distinct_answers response_length token_entropy token_entropy_policy token_entropy_momentum ratio_mean clip_low_share
clip_high_share tis_mean tis_clipped_share logprob_gap vote_accuracy nonfinite_steps""".split()


def make_config(backend: str = "reference") -> Config:
    """A run in which ratios leave 1, the filter prunes, groups disagree and the KL counts."""
    base = make_preset("mgrpo_arithmetic")
    return replace(
        base,
        steps=STEPS,
        data=DataConfig(train="arithmetic:40:2-5:11"),
        rollout=replace(base.rollout, num_prompts=4, num_policy=6, num_momentum=2, temperature=1.2, max_new_tokens=36),
        momentum=MomentumConfig(decay=0.9),
        objective=ObjectiveConfig(kl_coef=0.05, kl_reference="momentum", clip_low=0.005, clip_high=0.01),
        optim=OptimConfig(lr=2e-4, num_minibatches=2, schedule="cosine", warmup_ratio=0.2),
        eval=EvalConfig(every=0),
        log=LogConfig(backends=(), kl_initial_every=1),
        kernels=KernelsConfig(backend=backend),
        monitor=MonitorConfig(retention_every=0),
    )


class Recorder(Engine):
    """An engine that keeps what another one generates."""

    weights_are_shared = True

    def __init__(self, engine: Engine):
        self.engine, self.tensors = engine, {}

    def update_weights(self, weights, tag):
        self.engine.update_weights(weights, tag)

    def generate(self, prompts, n, sampling, tag):
        rollouts = self.engine.generate(prompts, n, sampling, tag)
        call = len(self.tensors) // 5
        self.tensors |= {
            f"{call}/prompts": pack(prompts),
            f"{call}/tokens": rollouts.tokens.to(torch.uint8),
            f"{call}/lengths": rollouts.lengths.to(torch.uint8),
            f"{call}/logprobs": rollouts.logprobs,
            f"{call}/truncated": rollouts.truncated,
        }
        return rollouts


class Player(Engine):
    """An engine that returns what was recorded, to the same questions only."""

    has_model_logprobs = False  # they were recorded, and a replay may compute something else

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors, self.call = tensors, 0

    def update_weights(self, weights, tag):
        """Recorded rollouts need no weights."""

    def generate(self, prompts, n, sampling, tag):
        part = {name: self.tensors[f"{self.call}/{name}"] for name in ("tokens", "lengths", "logprobs", "truncated")}
        assert torch.equal(pack(prompts), self.tensors[f"{self.call}/prompts"]), "other prompts than recorded"
        assert len(part["tokens"]) == len(prompts) * n, "other rollouts than recorded"
        self.call += 1
        part["tokens"], part["lengths"] = part["tokens"].long(), part["lengths"].long()
        return Rollouts(**part, num_per_prompt=n, tag=tag)


def pack(prompts) -> torch.Tensor:
    """Token ids of several prompts in one row, each behind its length."""
    return torch.tensor([i for ids in prompts for i in (len(ids), *ids)], dtype=torch.uint8)


def play(engine_of) -> dict:
    """Takes the steps; returns their metrics, and how far each tensor of policy and momentum has moved."""
    trainer = Trainer(make_config(), make_engine=engine_of)
    start = {name: p.detach().double().clone() for name, p in trainer.model.named_parameters()}
    rows = [{key: row[key] for key in KEYS} for row in trainer.train(STEPS)]
    ends = {"policy": dict(trainer.model.named_parameters()), "momentum": trainer.momentum.weights}
    moved = {
        f"{source}/{name}": measure(w.detach(), start[name]) for source, ws in ends.items() for name, w in ws.items()
    }
    trainer.close()
    return {"base": base_digest(), "rows": rows, "moved": moved}


def measure(weight: torch.Tensor, start: torch.Tensor) -> list[float]:
    """Length of the way from the start, and its projection on a fixed direction."""
    way = (weight.double() - start).flatten()
    direction = torch.cos(torch.arange(len(way), dtype=torch.float64) ** 2)
    return [float(way.norm()), float(way @ direction / direction.norm())]


def base_digest() -> str:
    """SHA-256 of the shipped model's weights."""
    return hashlib.sha256((Path(resolve_path("builtin:arithmetic")) / "model.safetensors").read_bytes()).hexdigest()


def replay() -> dict:
    """Takes the steps on the recorded rollouts."""
    return play(lambda loaded, config: Player(load_file(ROLLOUTS)))


def record() -> None:
    """Writes both files."""
    recorders = []

    def recording(loaded, config):
        recorders.append(Recorder(start_engine(loaded, config.engine, stop=None, max_length=0)))
        return recorders[0]

    torch.set_num_threads(1)
    metrics = play(recording)
    save_file(recorders[0].tensors, ROLLOUTS)
    METRICS.write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    record()
