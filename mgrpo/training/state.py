"""The state that a run carries from step to step: writes and restores it.

A counter is saved by being part of an object with `state_dict` and `load_state_dict`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mgrpo.distributed.sharding import fill, sharded_like, whole
from mgrpo.distributed.world import ALONE, World
from mgrpo.errors import CheckpointError, EngineError
from mgrpo.models.load import LoadedModel
from mgrpo.models.momentum import Momentum
from mgrpo.models.rows import open_tensors
from mgrpo.rollout.source import RolloutSource, Tensors
from mgrpo.training.learner import Learner
from mgrpo.training.offload import HostAdamW


class Stateful(Protocol):
    """A part of the run whose state is JSON."""

    def state_dict(self) -> dict[str, Any]:
        """The state, for `load_state_dict`."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state."""
        ...


class TrainState:
    """Steps taken and rollbacks made."""

    def __init__(self) -> None:
        self.step = 0
        self.rollbacks = 0

    @contextmanager
    def next_step(self, source: RolloutSource) -> Iterator[int]:
        """Number of the next step; if the engine fails within the block, the counter and the source are reset."""
        self.step += 1
        try:
            yield self.step
        except EngineError:
            self.step -= 1
            source.undo()
            raise

    def state_dict(self) -> dict[str, Any]:
        """See Stateful."""
        return {"step": self.step, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Stateful."""
        self.step, self.rollbacks = state["step"], state["rollbacks"]


class Checkpointer:
    """Writes policy, momentum model, optimiser and parts into a folder, and restores them.

    Args:
        loaded, momentum, learner: owners of the tensors.
        source: has the batch in flight.
        parts: objects with further state, by name.
        fingerprints: digests of inputs that a resumed run must find unchanged, by option and content; None if unused.
        trusted: whether a model folder may run its own code.
        world: of the run.

    Attributes:
        threads: CPU threads of the process that wrote the restored checkpoint; None before.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        momentum: Momentum,
        learner: Learner,
        source: RolloutSource,
        *,
        parts: Mapping[str, Stateful],
        fingerprints: Mapping[str, str | None],
        trusted: bool,
        world: World = ALONE,
    ):
        self.loaded, self.momentum, self.learner, self.source, self.parts = loaded, momentum, learner, source, parts
        self.fingerprints, self.trusted, self.world = fingerprints, trusted, world
        self.threads: int | None = None

    def snapshot(self, *, copy: bool) -> Callable[[Path], None]:
        """Returns a function that writes the current state into a folder; of several ranks this rank's part of it.

        Policy, momentum model and optimiser are gathered and written by different ranks. Every rank must call it.

        Args:
            copy: copy the tensors to the host, so that the function may be called after the next step.
        """
        tensors = {
            "policy": self.loaded.weights(),
            "momentum": self.momentum.state_dict(),
            "optimizer": optimizer_tensors(self.learner.optimizer, self.learner.names),
        }
        if self.momentum.compensation:
            tensors["momentum_compensation"] = self.momentum.compensation
        rollouts, in_flight = self.source.state()  # before the sampler: it moves back if the generation has failed
        if rollouts:
            tensors["rollouts"] = in_flight
        own: dict[str, Tensors] = {}
        for owner, (name, values) in enumerate(tensors.items()):
            is_own = owner % self.world.size == self.world.rank
            taken = copy_tensors(values, keep=is_own) if copy or self.world.size > 1 else values
            if is_own:
                own[name] = taken
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if rollouts:
            state["rollouts"] = rollouts
        state |= {"threads": torch.get_num_threads(), "fingerprints": dict(self.fingerprints), "rng": rng_state()}
        text = json.dumps(state)

        def write(folder: Path) -> None:
            for name, values in own.items():
                if name in ("policy", "momentum"):
                    self.loaded.save(folder / name, values)
                else:
                    contiguous = {key: value.cpu().contiguous() for key, value in values.items()}
                    save_file(contiguous, folder / f"{name}.safetensors")
            if self.world.is_first:
                (folder / "state.json").write_text(text)

        return write

    def restore(self, folder: Path) -> None:
        """Restores what `snapshot` wrote; raises CheckpointError if data or base model differ."""
        state = _as_parts(json.loads((folder / "state.json").read_text()))
        for name, current in self.fingerprints.items():
            if None not in (current, saved := state["fingerprints"].get(name)) and saved != current:
                option, content = name.split("/")
                raise CheckpointError(
                    f"resume: --{option} must hold the {content} that {folder} was trained with, got others."
                )
        policy = self.loaded.read(folder / "policy", trust_remote_code=self.trusted)
        with torch.no_grad():
            for name, parameter in self.loaded.model.named_parameters():
                if name in policy:  # all of them, or those of the adapter
                    fill(parameter, policy[name])
        compensation = folder / "momentum_compensation.safetensors"
        self.momentum.load(
            self.loaded.read(folder / "momentum", trust_remote_code=self.trusted),
            open_tensors(compensation) if self.momentum.compensation else None,
        )
        load_optimizer(folder / "optimizer.safetensors", self.learner.optimizer, self.learner.names)
        rollouts = state.get("rollouts")
        self.source.restore(rollouts, load_file(folder / "rollouts.safetensors") if rollouts else {})
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.threads = state.get("threads")
        set_rng_state(state["rng"])


def _as_parts(state: dict[str, Any]) -> dict[str, Any]:
    """The state by parts, also from checkpoints of earlier releases, which have all counters in one object."""
    if "train" in state:
        return state
    counters = {
        "train": {key: state[key] for key in ("step", "rollbacks")},
        "learner": {"step": state["optimizer_step"]}
        | {key: state[key] for key in ("nonfinite_steps", "nonfinite_in_row")},
    }
    return state | counters


def copy_tensors(tensors: Mapping[str, torch.Tensor], *, keep: bool = True) -> dict[str, torch.Tensor]:
    """Copies tensors to the host, whole where they are sharded; a tied weight is one tensor in the copy too.

    Every rank must call it, because each has a part of a sharded tensor; one that does not keep them gets none.
    """
    copies: dict[int, torch.Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in copies:
            own = tensor.detach()
            gathered = whole(own)
            copies[id(tensor)] = gathered.to("cpu", copy=gathered is own) if keep else gathered.new_empty(0)
    return {name: copies[id(tensor)] for name, tensor in tensors.items()} if keep else {}


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
    for key, value in open_tensors(path).items():
        name, entry = key.rsplit("/", 1)
        if (parameter := by_name.get(name)) is None:
            continue  # a frozen weight, whose moments earlier releases saved
        if entry != "step":  # which AdamW counts on the CPU
            value = value[:] if isinstance(optimizer, HostAdamW) else sharded_like(parameter, value)
        optimizer.state[parameter][entry] = value


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
        total.update(whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
