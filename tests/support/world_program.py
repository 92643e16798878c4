"""A small program of several processes for tests of the launcher: python world_program.py FOLDER MODE [ARGUMENTS].

Each process writes its environment and arguments to FOLDER/ATTEMPT-RANK.json, waits until all have, and then does what
MODE says.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from mgrpo.process.disk import write_aside
from mgrpo.process.signals import end_with_parent

RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def end(number: int, frame: object) -> None:
    """Ends as a run that has saved."""
    sys.exit(75)


def wait() -> None:
    """Waits for a signal; an end by SIGTERM is noted."""
    (folder / f"{ATTEMPT}-{RANK}.waits").touch()
    time.sleep(120)


def count_ranks() -> None:
    """Meets the others on gloo, again and again, where rank 1 of the first attempt is killed.

    In the second attempt rank 0 is there first. The address of the killed rank, if it found that, would fail it every
    other time: gloo compares the addresses of two ranks to decide which one of them connects.
    """
    import torch
    import torch.distributed as dist

    from mgrpo.distributed.world import join_world

    world = join_world("cpu", timeout_s=15)
    for _ in range(8):
        if (RANK, ATTEMPT) == (1, 1):
            time.sleep(0.2)
        dist.new_group(backend="gloo", timeout=timedelta(seconds=15))
    if (RANK, ATTEMPT) == (1, 0):
        os.kill(os.getpid(), signal.SIGKILL)
    total = world.sum_(torch.ones(1)).item()
    if world.is_first:
        (folder / "total").write_text(str(total))
    world.barrier()
    world.close()


if __name__ == "__main__":
    end_with_parent()
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGUSR1, end)
    place = {name: os.environ[name] for name in NAMES} | {"pid": os.getpid(), "arguments": sys.argv[3:]}
    place["store is shared"] = os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    write_aside(folder / f"{ATTEMPT}-{RANK}.json", json.dumps(place))
    while not all((folder / f"{ATTEMPT}-{rank}.json").exists() for rank in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.02)
    if mode == "gloo":
        count_ranks()
    elif mode == "wait" or (mode in ("kill", "fail") and RANK != 1):
        wait()
    elif mode == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait() if RANK else sys.exit(5)
    elif mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif mode == "fail":
        sys.exit(1 if ATTEMPT == 0 else 4)
    else:
        sys.exit(int(mode))
