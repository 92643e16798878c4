"""Accuracy of MGRPOTrainer in stock TRL against that of `mgrpo.train`: `python -m bench.studies.trl_accuracy`.

Both have the same base, file of prompts and options, 100 steps, fp32, one CPU thread; then both policies are evaluated
on the same eval set, greedily and sampled.
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from mgrpo.config import ModelConfig
from mgrpo.models.files import quiet_transformers
from mgrpo.models.load import load_model
from mgrpo.models.tokenizer import resolve_path
from mgrpo.presets import make_preset
from mgrpo.tasks.arithmetic import ExportArgs, export
from mgrpo.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class AccuracyArgs:
    """Runs to train. Existing results in the folder are only printed."""

    out: Path = Path("trl_accuracy")
    """Folder of prompts, results and the table."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of both."""
    steps: int = 100
    """Optimiser steps."""
    parallel: int = 2
    """Concurrent runs."""


def evaluate(model_path: Path) -> dict[str, float]:
    """Greedy and sampled accuracy of a saved policy on 500 prompts."""
    base = make_preset("arithmetic")
    config = replace(
        base,
        model=ModelConfig(path=str(model_path)),
        data=replace(base.data, probe="arithmetic:500:3-7:1000003"),
        log=replace(base.log, kl_initial_every=0, backends=()),
    )
    trainer = Trainer(config)
    result = trainer.evaluator.evaluate("policy", trainer.step)
    trainer.close()
    return {"greedy": result.greedy or 0.0, "sampled": result.avg_at_k}


def train(args: AccuracyArgs, which: str, seed: int) -> None:
    """One run and its accuracy."""
    result, model = args.out / f"{which}-{seed}.json", args.out / f"{which}-{seed}"
    if result.exists():
        return
    torch.set_num_threads(1)
    quiet_transformers()
    prompts = args.out / "prompts.jsonl"
    if which == "mgrpo.train":
        base = make_preset("arithmetic")
        trainer = Trainer(
            replace(
                base,
                steps=args.steps,
                seed=seed,
                data=replace(base.data, train=str(prompts), probe=None),
                eval=replace(base.eval, every=0),
                log=replace(base.log, kl_initial_every=0, backends=()),
            )
        )
        list(trainer.train(args.steps))
        trainer.model.save_pretrained(model)
        trainer.loaded.tokenizer.save_pretrained(model)
        trainer.close()
    else:
        train_in_trl(args, prompts, model, seed)
    result.write_text(json.dumps(evaluate(model)))


def train_in_trl(args: AccuracyArgs, prompts: Path, model: Path, seed: int) -> None:
    """Trains with the options of the preset under TRL's names."""
    from datasets import load_dataset

    from mgrpo.integrations.trl import MGRPOConfig, MGRPOTrainer

    trainer = MGRPOTrainer(
        model=resolve_path("builtin:arithmetic"),
        args=MGRPOConfig(
            output_dir=str(args.out / "trl"),
            max_steps=args.steps,
            seed=seed,
            per_device_train_batch_size=128,
            num_generations=8,
            num_momentum_generations=8,
            momentum_decay=0.999,
            vote_pool="momentum",
            filter_scope="prompt",
            answer_extract=r"regex:#(\d\d)",
            answer_equivalence="exact",
            max_completion_length=64,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=str(prompts), split="train", cache_dir=str(args.out / "cache")),
    )
    trainer.train()
    trainer.save_model(str(model))
    trainer.checker.close()


def main() -> None:
    """Trains the missing runs and prints the table."""
    args = tyro.cli(AccuracyArgs, description=__doc__)
    args.out.mkdir(parents=True, exist_ok=True)
    export(ExportArgs(out=args.out / "prompts.jsonl", num=8192))
    jobs = [(which, seed) for seed in args.seeds for which in ("trl", "mgrpo.train")]
    with ProcessPoolExecutor(args.parallel, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(train, args, *job) for job in jobs]:
            future.result()
    before = evaluate(Path(load_model(ModelConfig()).model.name_or_path))
    print(f"before: greedy {before['greedy']:.3f}, sampled {before['sampled']:.3f}")
    for which, seed in sorted(jobs):
        found = json.loads((args.out / f"{which}-{seed}.json").read_text())
        print(f"{which} seed {seed}: greedy {found['greedy']:.3f}, sampled {found['sampled']:.3f}", flush=True)


if __name__ == "__main__":
    main()
