"""Options of runs with several processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mgrpo.config.option import option

LANES = 8
"""Parts into which tree mode deals a batch, whatever the number of processes."""


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Several processes."""

    processes: int | Literal["auto"] | None = option(None, least=1, most=4096, resumable=True)
    """Processes that the command starts on this machine; `auto` is one for each GPU, without GPUs one. None starts no
    other; torchrun can still start several."""
    replicate: int = option(1, least=1, resumable=True)
    """Copies of weights and optimiser, each divided among processes / replicate of them; on several machines, one copy
    a machine keeps most traffic inside."""
    reduce: Literal["default", "tree"] = "default"
    """Order in which gradients of processes are added: that of the library, or `tree`, with which 1, 2, 4 and 8
    processes give the same bits."""
    max_restarts: int = option(0, least=0, resumable=True)
    """Times that the command starts all processes again, from the newest checkpoint, after one was killed or failed."""
    timeout_s: float = option(1800.0, above=0, resumable=True)
    """Longest wait for another process in seconds; beyond it the run ends."""

    @property
    def tree(self) -> bool:
        """Whether the bits must not depend on the number of processes."""
        return self.reduce == "tree"


def world_problems(size: int, *, replicate: int, reduce: str = "default") -> list[str]:
    """A message for each option that does not fit a number of processes."""
    problems = []
    if size % replicate:
        problems.append(
            f"config: --distributed.replicate must divide the number of processes ({size}), got {replicate}."
        )
    if reduce == "tree" and LANES % size:
        problems.append(f"config: --distributed.reduce tree needs 1, 2, 4 or 8 processes, got {size}.")
    if reduce == "tree" and replicate > 1:
        problems.append(f"config: --distributed.reduce tree needs --distributed.replicate 1, got {replicate}.")
    return problems
