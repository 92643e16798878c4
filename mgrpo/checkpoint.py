"""Checkpoints: safetensors and JSON only, written aside, sealed by a SHA-256 manifest, then renamed.

step_N/ holds policy/ and momentum/ in the transformers layout, the optimiser, and state.json. No pickle is ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mgrpo.metrics import StorageError

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged, or of another run."""


def save_checkpoint(run_dir: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Lets `write` fill a folder, seals it with a manifest, and renames it to checkpoints/step_N.

    A crash at any moment leaves the earlier checkpoints as they were.
    """
    final = run_dir / "checkpoints" / f"step_{step}"
    aside = final.with_name(f".step_{step}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write_aside(aside, step, write)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StorageError(
            f"checkpoint: {final} could not be written: {error}. Earlier ones are as they were."
        ) from error
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    _fsync(final.parent)
    return final


def _write_aside(aside: Path, step: int, write: Callable[[Path], None]) -> None:
    """Fills the folder, seals it and flushes everything to the disk."""
    aside.mkdir(parents=True)
    write(aside)
    digests = {str(p.relative_to(aside)): _sha256(p) for p in sorted(aside.rglob("*")) if p.is_file()}
    (aside / MANIFEST).write_text(json.dumps({"step": step, "sha256": digests}, indent=1))
    for path in [*aside.rglob("*"), aside]:
        _fsync(path)


def verify_checkpoint(folder: Path) -> int:
    """Returns the step of a complete checkpoint; raises CheckpointError naming the file that is not as written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        step, digests = int(manifest["step"]), dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint: {folder / MANIFEST} must be as it was written, got {error!r}.") from error
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or _sha256(path) != digest:
            raise CheckpointError(f"checkpoint: {path} must be as it was written, got other bytes or no file.")
    return step


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first, without looking inside."""
    found = [p for p in (run_dir / "checkpoints").glob("step_*") if p.name.removeprefix("step_").isdigit()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """Step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("step_"))


def newest_valid(run_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that verifies, and what is wrong with newer ones."""
    complaints: dict[Path, str] = {}
    for folder in reversed(list_checkpoints(run_dir)):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            complaints[folder] = str(error)
        else:
            return folder, complaints
    return None, complaints


def sweep(run_dir: Path) -> None:
    """Deletes what a crash left of a checkpoint that was being written."""
    for aside in (run_dir / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(aside)


def prune_checkpoints(run_dir: Path, *, keep_last: int, best: list[int]) -> None:
    """Deletes all but the newest `keep_last` checkpoints and those of the steps in `best`."""
    folders = list_checkpoints(run_dir)
    for folder in folders[:-keep_last]:
        if step_of(folder) not in best:
            shutil.rmtree(folder)


def save_optimizer(path: Path, optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Writes AdamW's moments; `names` are the parameters in the optimiser's order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(tensors, path)


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Restores AdamW's moments, bit for bit."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    by_name = dict(zip(names, parameters, strict=True))
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


def _sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
