"""Ranks of a run for tests: a script that forks after its imports, so that only one process pays for them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from mgrpo.distributed.world import World, join_world

SUPPORT = Path(__file__).parent


def run_script(name: str, size: int, folder: Path, *, timeout_s: float = 300) -> None:
    """Runs tests/support/NAME as `size` ranks that write to a folder; an AssertionError shows what they print."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, str(SUPPORT / name), str(size), port, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert result.returncode == 0, result.stdout + result.stderr


def main(work: Callable[[World, Path], None], *, timeout_s: float = 60.0) -> None:
    """Forks the ranks of the command line and runs `work` on each, given its world and the folder."""
    size, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    rank, children = 0, []
    for other in range(1, size):
        child = os.fork()
        if child == 0:
            rank, children = other, []
            break
        children.append(child)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    torch.set_num_threads(1)
    world = join_world("cpu", timeout_s=timeout_s)
    work(world, folder)
    world.close()
    assert not dist.is_initialized()
    sys.exit(max((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), default=0))
