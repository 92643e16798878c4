"""Tensors and generators of a training state, copied, digested and restored."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file


def copy_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies tensors to the host; those that share their memory, as tied weights do, share it again."""
    copies: dict[tuple[int, torch.Size, tuple[int, ...]], torch.Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in copies or not tensor.numel():
            copies[key] = tensor.detach().to("cpu", copy=True)
        found[name] = copies[key]
    return found


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """AdamW's moments by name; `names` are the parameters in the optimiser's order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{name}/{key}": value.detach()
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Restores AdamW's moments, bit for bit."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    by_name = dict(zip(names, parameters, strict=True))
    optimizer.state.clear()
    for key, value in load_file(path).items():
        name, entry = key.rsplit("/", 1)
        parameter = by_name[name]
        # AdamW counts its steps on the CPU.
        optimizer.state[parameter][entry] = value if entry == "step" else value.to(parameter.device)


def rng_state() -> dict[str, Any]:
    """State of every global generator: Python, NumPy, torch CPU and CUDA."""
    version, internal, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in cuda],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_hex(state["torch"]))
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all([_from_hex(s) for s in state["cuda"]])


def _from_hex(text: str) -> torch.Tensor:
    """Bytes as a uint8 tensor."""
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors' bytes."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
