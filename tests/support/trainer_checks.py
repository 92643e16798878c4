"""A run of the trainer on several ranks: python trainer_checks.py SIZE PORT FOLDER.

Rank 0 writes what it found to FOLDER/found.json, and all of them a checkpoint. With FOLDER/../saved1, a checkpoint
of one process, it continues that one too.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ranks import main
from step_checks import digest

from mgrpo.config import (
    Config,
    DistributedConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
)
from mgrpo.distributed.world import World
from mgrpo.presets import make_preset
from mgrpo.run.checkpoint import Writer, verify_checkpoint
from mgrpo.run.preflight import rehearse
from mgrpo.tasks.arithmetic import make_problems
from mgrpo.training.trainer import Trainer
from mgrpo.types import Metrics

STEPS = 3
# Differ from one run to the next.
OF_THE_MACHINE = ("time_", "step_s", "tokens_per_s", "memory")


def make_config(*, reduce: str = "tree", data: str = "arithmetic:12:2-3:5", **options: Any) -> Config:
    base = make_preset("arithmetic")
    return replace(
        base,
        steps=6,
        seed=3,
        distributed=DistributedConfig(reduce=reduce),
        rollout=RolloutConfig(num_prompts=5, num_policy=4, num_momentum=4, max_new_tokens=48),
        optim=OptimConfig(lr=1e-3, num_minibatches=2, micro_batch_tokens=512),
        momentum=replace(base.momentum, decay=0.9),
        objective=replace(base.objective, kl_coef=0.05, kl_reference="initial"),
        filter=replace(base.filter, score="source", scope="batch"),
        data=replace(base.data, train=data, probe="arithmetic:3:2-2:9"),
        eval=EvalConfig(every=2, samples=2),
        log=LogConfig(kl_initial_every=1, samples=1),
        **options,
    )


def make_trainer(world: World, **options: Any) -> Trainer:
    return Trainer(make_config(**options), world=world)


def state(trainer: Trainer) -> list[str]:
    states = [trainer.learner.optimizer.state[p] for p in trainer.learner.parameters]
    moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
    return [digest(t) for t in (trainer.model.parameters(), trainer.momentum.weights.values(), moments)]


def comparable(row: Metrics) -> Metrics:
    """A row without what depends on the machine."""
    return {key: value for key, value in row.items() if not key.startswith(OF_THE_MACHINE)}


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _with_labels(world: World, folder: Path, shift: int) -> list[str]:
    """State after training on problems whose answers are those of others."""
    problems = make_problems(12, operands=(2, 3), seed=5)
    path = folder / f"labels{shift}.jsonl"
    if world.is_first:
        answers = [problem.answer for problem in problems]
        rows = [
            {"prompt": problem.prompt, "answer": answer}
            for problem, answer in zip(problems, answers[shift:] + answers[:shift], strict=True)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    world.barrier()
    trainer = make_trainer(world, data=str(path))
    list(trainer.train(2))
    trainer.close()
    return state(trainer)


def _with_lora(world: World, folder: Path) -> list[Any]:
    """Metrics and state with adapters in fp32 beside weights in bf16, of which a rank of four has no row of A."""
    options = {"lora": LoraConfig(rank=3), "model": ModelConfig(dtype="bf16")}
    config = make_config(**options)
    config = replace(
        config,
        optim=replace(config.optim, packing="packed"),
        rollout=replace(config.rollout, max_new_tokens=24),
        data=replace(config.data, probe=None),
    )
    trainer = Trainer(config, world=world)
    rehearse(trainer, folder)
    rows = [comparable(row) for row in trainer.train(2)]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32, torch.bfloat16}
    trainer.close()
    return [rows, state(trainer)]


def run(world: World, folder: Path) -> None:
    found: dict[str, Any] = {}
    trainer = make_trainer(world)
    found["rows"] = [comparable(row) for row in trainer.train(STEPS)]
    found["state"] = state(trainer)
    saved, given = folder / "checkpoints" / f"step_{STEPS}", folder.parent / "saved1"
    with Writer(folder, world=world) as writer:
        writer.save(STEPS, trainer.snapshot(), keep_last=2, best=[])
    world.barrier()
    assert verify_checkpoint(saved) == STEPS
    found["files"] = files(saved)
    found["next"] = [comparable(row) for row in trainer.train(STEPS + 2)] + state(trainer)
    for name, source in {"own": saved, "of one process": given}.items():
        if source.exists():
            trainer.restore(source)
            assert state(trainer) == found["state"], name
            found[f"resumed {name}"] = [comparable(row) for row in trainer.train(STEPS + 2)] + state(trainer)
    trainer.close()
    found["lora"] = _with_lora(world, folder)
    if world.size == 2:
        found["labels"] = [_with_labels(world, folder, shift) for shift in (0, 1)]
    if world.is_first:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(run)
