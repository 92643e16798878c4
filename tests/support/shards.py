"""One process of momentum models beside policies that FSDP2 shards, or alone beside some that nothing shards.

RANK=0 WORLD_SIZE=2 ... python shards.py FOLDER
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from small_run import BASE, problems, small_args
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl import GRPOTrainer
from trl_ranks import ROWS, invent

import mgrpo_kernels as K
from mgrpo.config import MomentumConfig
from mgrpo.integrations.trl import MGRPOTrainer
from mgrpo.integrations.trl.momentum import MomentumCallback

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ["WORLD_SIZE"])


def whole(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in sorted(tensors.items())}
    return {name: t.detach().clone() for name, t in full.items()}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in whole(tensors).values())).hexdigest()


def barrier() -> None:
    if WORLD > 1:
        torch.distributed.barrier()


def watch_callback(folder: Path) -> dict[str, Any]:
    """The callback alone, beside a model of two layers."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 4))
    if WORLD > 1:
        mesh = torch.distributed.init_device_mesh("cpu", (WORLD,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    callback = MomentumCallback(MomentumConfig(decay=0.75))
    state, found = SimpleNamespace(global_step=0, max_steps=3), {}
    callback.on_train_begin(None, state, None, model=model)
    inputs = torch.linspace(-1, 1, 12).view(2, 6)
    for step in range(1, 4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        state.global_step = step
        callback.on_step_end(None, state, None)
    own = digest(dict(model.named_parameters()))
    with torch.no_grad(), callback.lent():
        found["lent"] = model(inputs).tolist()
    found["given back"] = digest(dict(model.named_parameters())) == own
    with torch.no_grad():
        found["own"] = model(inputs).tolist()
    found["momentum"] = digest(callback.started.weights)
    callback.save(folder, is_main=RANK == 0)
    barrier()
    found["file"] = hashlib.sha256((folder / "momentum.safetensors").read_bytes()).hexdigest()
    again = MomentumCallback(MomentumConfig(decay=0.75))
    again.load(folder, model)
    found["loaded"] = digest(again.started.weights) == found["momentum"]
    with torch.no_grad():
        next(iter(model.parameters())).mul_(float("nan"))
    state.global_step = 4
    try:
        callback.on_step_end(None, state, None)
    except FloatingPointError as error:
        found["refused"] = str(error)[:60]
    found["sharded"] = isinstance(next(iter(model.parameters())), DTensor)
    return found


def make_trainer(folder: Path, *, lora: bool) -> MGRPOTrainer:
    sharded = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "Qwen3DecoderLayer"}} if WORLD > 1 else {}
    args = small_args(
        folder,
        per_device_train_batch_size=ROWS // WORLD,
        save_strategy="steps",
        save_steps=1,
        momentum_decay=0.5,
        learning_rate=1.0,
        adam_epsilon=1.0,  # steps in proportion to the gradient, so that its rounding stays small
        seed=3,
        bf16=False,
        **sharded,
    )
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear") if lora else None
    return MGRPOTrainer(BASE, args=args, train_dataset=Dataset.from_list(problems()), peft_config=config)


def watch_trainer(folder: Path, *, lora: bool) -> dict[str, Any]:
    """Two steps of a trainer, of which a second one repeats the last from a checkpoint."""
    ids, logits = torch.arange(4, 12)[None], []

    def generate(self: Any, prompt_ids: Any, images: Any, fields: Any, num_generations: int) -> Any:
        with torch.no_grad():
            logits.append((num_generations, self.model(ids).logits[0, -1].tolist()))
        return invent(self, prompt_ids, images, fields, num_generations)

    GRPOTrainer._generate_single_turn = generate
    trainer = make_trainer(folder / "straight", lora=lora)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    step, average, follows = trainer.momentum.on_step_end, {}, []

    def own() -> dict[str, torch.Tensor]:
        return whole({name: p for name, p in trainer.model.named_parameters() if name in trained})

    def follow(*args: Any, **options: Any) -> None:
        policy = own()
        K.ema_update_([average[name] for name in policy], list(policy.values()), 0.5)
        step(*args, **options)
        follows.append(digest(average) == digest(trainer.momentum.started.weights))

    average |= own()
    trainer.momentum.on_step_end = follow
    trainer.train()
    momentum, policy = digest(trainer.momentum.started.weights), digest(own())
    resumed = make_trainer(folder / "resumed", lora=lora)
    resumed.train(resume_from_checkpoint=str(folder / "straight" / "checkpoint-1"))
    again = {name: p for name, p in resumed.model.named_parameters() if name in trained}
    place = "momentum/adapter_model.safetensors" if lora else "momentum.safetensors"
    file = load_file(folder / "straight" / "checkpoint-2" / place)
    saved = {name.replace(".default.", "."): t for name, t in whole(trainer.momentum.started.weights).items()}
    return {
        "sharded": all(isinstance(w, DTensor) for w in trainer.momentum.started.weights.values()),
        "average": follows == [True] * 2 and momentum != policy,
        "resumed": digest(resumed.momentum.started.weights) == momentum and digest(again) == policy,
        "saved": file.keys() == saved.keys() and all(torch.equal(file[name], saved[name]) for name in saved),
        "logits": logits[:4],
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    if WORLD > 1:
        torch.distributed.init_process_group("gloo")
        begin = AcceleratorState.__init__

        def begin_sharded(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
            """What accelerate does on accelerators; on CPUs it leaves a plug-in for FSDP out."""
            begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
            if fsdp_plugin is not None:
                self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
                PartialState._shared_state["distributed_type"] = DistributedType.FSDP

        AcceleratorState.__init__ = begin_sharded
    found = {"callback": watch_callback(folder)}
    for kind in ("whole", "lora"):
        found[kind] = watch_trainer(folder / kind, lora=kind == "lora")
        barrier()
    (folder / f"rank{RANK}.json").write_text(json.dumps(found))
    if WORLD > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
