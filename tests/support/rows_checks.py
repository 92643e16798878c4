"""Runs of the trainer whose ranks read their rows of a model alone: python rows_checks.py SIZE PORT FOLDER.

The engine, which stands for vLLM, has a whole model of its own and gets every weight. Rank 0 writes what it found to
FOLDER/found.json.
"""

from __future__ import annotations

import ctypes
import gc
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ranks import main
from trainer_checks import comparable, files, make_config, state
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from mgrpo.config import Config, EngineConfig, LoraConfig, ModelConfig
from mgrpo.distributed.sharding import shard_model
from mgrpo.distributed.world import World
from mgrpo.models.load import LoadedModel, load_model
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.run.checkpoint import Writer
from mgrpo.run.preflight import rehearse
from mgrpo.tasks.arithmetic import make_tokenizer
from mgrpo.training.trainer import Trainer

STEPS = 2


class OwnModel(TransformersEngine):
    """Generates with a whole model of its own."""

    weights_are_shared = False

    def __init__(self, world: World, loaded: LoadedModel, config: Config):
        own = load_model(config.model)
        ends = {"eos_ids": own.eos_ids, "pad_id": own.pad_id}
        super().__init__(own.model, **ends, dtype=own.dtype, batch_size=64, world=world)


VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": LoraConfig(rank=3)},
    "lora in bf16": {"lora": LoraConfig(rank=3), "model": ModelConfig(dtype="bf16")},
}


def make_trainer(world: World, **options: Any) -> Trainer:
    base = make_config()
    options |= {"engine": EngineConfig(name="vllm"), "data": replace(base.data, probe=None)}
    config = replace(base, rollout=replace(base.rollout, max_new_tokens=32), **options)
    return Trainer(config, world=world, make_engine=partial(OwnModel, world))


def run_trainer(world: World, folder: Path, **options: Any) -> dict[str, Any]:
    """Metrics and state after some steps, digests of a checkpoint, and what follows it."""
    trainer = make_trainer(world, **options)
    rehearse(trainer, folder)
    assert (trainer.loaded.files is None) == (world.size == 1)
    found: dict[str, Any] = {"rows": [comparable(row) for row in trainer.train(STEPS)], "state": state(trainer)}
    with Writer(folder, world=world) as writer:
        writer.save(STEPS, trainer.snapshot(), keep_last=2, best=[])
    world.barrier()
    saved = folder / "checkpoints" / f"step_{STEPS}"
    found["files"] = {name: file for name, file in files(saved).items() if name not in ("state.json", "manifest.json")}
    found["next"] = [*[comparable(row) for row in trainer.train(STEPS + 1)], state(trainer)]
    trainer.restore(saved)
    assert state(trainer) == found["state"]
    assert [*[comparable(row) for row in trainer.train(STEPS + 1)], state(trainer)] == found["next"]
    trainer.close()
    return found


def save_large(folder: Path) -> None:
    """Writes a model of 8 layers."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8192}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "eos_token_id": 1}
    with no_init_weights():
        model = LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    model.bfloat16().save_pretrained(folder)  # fp32 would stay mapped, in memory of the file
    make_tokenizer().save_pretrained(folder)


def peak_while(function: Callable[[], object]) -> int:
    """Growth of this process's own memory within a call, in bytes, files that are mapped left out."""

    def own() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return 1024 * int(line.split()[1])

    done, start, most = threading.Event(), own(), [0]

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], own() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        most[0] = max(most[0], own() - start)
        done.set()
        watcher.join()
    return most[0]


def memory_of_loading(world: World, folder: Path) -> list[float]:
    """The most that a rank holds while it loads its shard, by rows and from the whole, as a share of the model."""
    large = folder / "large"
    if world.is_first:
        save_large(large)
    world.barrier()
    found = []

    def load(by_rows: bool) -> LoadedModel:
        loaded = load_model(ModelConfig(path=str(large), device="cpu"), by_rows=by_rows)
        shard_model(loaded.model, world, dtype=torch.float32, tree=False)
        loaded.fill()
        return loaded

    for by_rows in (True, False):
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        found.append(peak_while(partial(load, by_rows)) / (2 * (large / "model.safetensors").stat().st_size))
    return found


def run(world: World, folder: Path) -> None:
    found: dict[str, Any] = {}
    if world.size > 1:
        found["memory"] = world.gather_json(memory_of_loading(world, folder))
    for name, options in VARIANTS.items():
        found[name] = run_trainer(world, folder / name, **options)
    if world.is_first:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(run)
