"""One process of a momentum model beside a policy that FSDP2 shards, or alone beside one that nothing shards.

RANK=0 WORLD_SIZE=2 ... python shards.py FOLDER
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mgrpo.config import MomentumConfig
from mgrpo.integrations.trl.momentum import MomentumCallback


def digest(tensors: dict[str, torch.Tensor]) -> str:
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in sorted(tensors.items())}
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in whole.values())).hexdigest()


def main(folder: Path) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 4))
    if world > 1:
        torch.distributed.init_process_group("gloo")
        mesh = torch.distributed.init_device_mesh("cpu", (world,))
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
    callback.save(folder, is_main=rank == 0)
    if world > 1:
        torch.distributed.barrier()
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
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
