"""Kills one of two ranks at every file operation of a save: python save_chaos.py SIZE PORT FOLDER.

The save itself has no collective, so that each attempt runs in children of the ranks; rank 0 then looks at what is left
and writes the number of attempts to FOLDER/found.json.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import main
from trainer_checks import make_trainer

from mgrpo.distributed.world import World
from mgrpo.errors import StorageError
from mgrpo.run.checkpoint import Writer, make_room, newest_valid, save_checkpoint, save_part, sweep

FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir", "os.scandir"}
MOST = 500
PATIENCE_S = 60.0


def attempt(folder: Path, write: Callable[[Path], None], rank: int, kill_at: int | None) -> int | None:
    """Saves a part in a child that is killed at its file operation `kill_at`; returns its signal, or None.

    Rank 0 waits for the part of the other one until that one is killed.
    """
    gone = folder / "gone"
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in FILE_EVENTS and str(folder) in str(arguments[0]):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        clock, jumps = time.monotonic, itertools.count(0, PATIENCE_S)
        time.monotonic = lambda: clock() + (next(jumps) if gone.exists() else 0)
        try:
            if rank == 0:
                save_checkpoint(folder, 2, write, size=2, timeout_s=PATIENCE_S)
            else:
                save_part(folder, 2, write, rank=rank)
        except (StorageError, OSError):  # the other rank did not write its part
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        return None
    if rank == 1:
        gone.touch()
    return os.WTERMSIG(status)


def run(world: World, folder: Path) -> None:
    trainer = make_trainer(world, reduce="default")
    trainer.train_step()
    with Writer(folder, world=world) as writer:
        writer.save(1, trainer.snapshot(), keep_last=2, best=[])
    trainer.train_step()
    write = trainer.snapshot()
    ends = []
    for victim in range(world.size):
        for kill_at in range(1, MOST):
            if world.is_first:
                make_room(folder, 2)
                (folder / "gone").unlink(missing_ok=True)
            world.barrier()
            found = attempt(folder, write, world.rank, kill_at if world.rank == victim else None)
            was_killed = world.any(found == signal.SIGKILL)
            if world.is_first:
                sweep(folder)
                newest, complaints = newest_valid(folder)
                assert newest is not None and not complaints, (victim, kill_at, complaints)
                ends.append(newest.name)
                assert was_killed or newest.name == "step_2", (victim, kill_at)
                left = sorted(path.name for path in (folder / "checkpoints").iterdir())
                assert left == sorted({"step_1", newest.name}), (victim, kill_at, left)
            world.barrier()
            if not was_killed:
                break
    if world.is_first:
        (folder / "found.json").write_text(json.dumps(ends))
    trainer.close()


if __name__ == "__main__":
    main(run)
