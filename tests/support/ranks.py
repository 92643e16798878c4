"""Ranks of a run for tests: a script that forks after its imports, so that only one process pays for them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from mgrpo.distributed.world import World, join_world
from mgrpo.process.signals import end_with_parent

SUPPORT = Path(__file__).parent


def run_script(name: str, size: int, folder: Path, *, timeout_s: float = 300) -> str:
    """Runs tests/support/NAME as `size` ranks that write to a folder; returns what they print."""
    return _run(name, {size: folder}, timeout_s)


def run_sizes(name: str, sizes: Sequence[int], base: Path, *, timeout_s: float = 600) -> dict[int, Path]:
    """Runs tests/support/NAME with several numbers of ranks at once; returns their folders, which are in `base`."""
    folders = {size: base / str(size) for size in sizes}
    for folder in folders.values():
        folder.mkdir()
    _run(name, folders, timeout_s)
    return folders


def _run(name: str, folders: Mapping[int, Path], timeout_s: float) -> str:
    places = [value for size, folder in folders.items() for value in (str(size), str(_free_port()), str(folder))]
    command = [sys.executable, str(SUPPORT / name), *places]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    printed = result.stdout + result.stderr
    assert result.returncode == 0, printed
    return printed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(work: Callable[[World, Path], None], *, timeout_s: float = 60.0) -> None:
    """Forks the ranks of the command line, SIZE PORT FOLDER for each number of ranks, and runs `work` on each.

    `work` is given the rank's world and the folder.
    """
    groups = [(int(size), port, Path(folder)) for size, port, folder in zip(*[iter(sys.argv[1:])] * 3, strict=True)]
    children = []
    for size, port, folder in groups:
        for rank in range(size):
            child = os.fork()
            if child == 0:
                _work(work, rank, size, port, folder, timeout_s)
            children.append(child)
    sys.exit(max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children))


def _work(
    work: Callable[[World, Path], None], rank: int, size: int, port: str, folder: Path, timeout_s: float
) -> NoReturn:
    """Takes part as one rank."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    end_with_parent()
    torch.set_num_threads(1)
    world = join_world("cpu", timeout_s=timeout_s)
    work(world, folder)
    world.close()
    assert not dist.is_initialized()
    sys.exit()
