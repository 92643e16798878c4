"""How several processes end as one: with the exit code of the first error, which is shown once.

exit.json in the run directory holds the exit code. Who creates it is the first, and shows its error.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from mgrpo.distributed.world import World
from mgrpo.errors import Ended, Exit, Interrupted

EXIT_FILE = "exit.json"
# Longer than a process that fails needs to create the file, and than a launcher needs to notice a signal.
LOST_S = 3.0
# What torch says where another process has ended or is late; most of it is a plain RuntimeError.
LOST = re.compile(
    r"gloo/transport|closed by peer|reset by peer|connection refused|broken pipe|timed? ?out|monitoredBarrier"
    r"|remote process|failed to recv|ncclRemoteError|NCCL communicator was aborted",
    re.IGNORECASE,
)


def claim(run_dir: Path, code: int, *, rank: int, error: str | None = None, since: float = 0.0) -> bool:
    """Writes exit.json unless somebody has; returns whether the caller is the first, and has to show its error.

    Args:
        run_dir: the run directory. Where nothing can be written into it, everybody is the first.
        code: exit code of the run.
        rank: the rank whose error it is.
        error: its message.
        since: a file that is older, in seconds since 1970, is of an earlier start and is replaced.
    """
    path = run_dir / EXIT_FILE
    try:
        if path.exists() and path.stat().st_mtime < since:
            path.unlink(missing_ok=True)
        with path.open("x") as file:
            json.dump({"code": int(code), "name": _name(code), "rank": rank, "error": error}, file)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def _name(code: int) -> str:
    """The name of an exit code, of several words."""
    return Exit(code).name.lower().replace("_", " ") if code in list(Exit) else "unknown"


def read_exit(run_dir: Path, *, since: float = 0.0) -> int | None:
    """The exit code in exit.json; None without one that is newer than `since`, in seconds since 1970."""
    path = run_dir / EXIT_FILE
    try:
        return int(json.loads(path.read_text())["code"]) if path.stat().st_mtime >= since else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def begin(world: World, run_dir: Path) -> None:
    """Removes the exit.json of an earlier start, before any rank can end."""
    if world.size > 1:
        if world.is_first:
            (run_dir / EXIT_FILE).unlink(missing_ok=True)
        world.barrier()


@contextmanager
def ending(world: World, run_dir: Path) -> Iterator[None]:
    """Turns an error into Ended, with the exit code of the run's first error.

    Ended has this error as its cause if this is the first one, and no cause if it follows from that of another rank.
    """
    try:
        yield
    except (Exception, Interrupted) as error:
        if world.size == 1 or isinstance(error, Ended):
            raise
        code = int(getattr(error, "exit_code", Exit.ERROR))
        if is_lost(error) and (found := _wait_for_exit(run_dir)) is not None:
            raise Ended(found) from None
        if claim(run_dir, code, rank=world.rank, error=str(error)):
            raise Ended(code) from error
        raise Ended(read_exit(run_dir) or code) from None


def _wait_for_exit(run_dir: Path) -> int | None:
    """The exit code that another process writes soon, None if none does."""
    end = time.monotonic() + LOST_S
    while (code := read_exit(run_dir)) is None and time.monotonic() < end:
        time.sleep(0.05)
    return code


def end_together(world: World, error: Exception | None) -> None:
    """Raises an error of rank 0 on every rank, on the others without a cause. Collective.

    For errors before `begin`, which must not write into the run directory.
    """
    if world.size == 1:
        if error:
            raise error
        return
    code = world.broadcast(error and int(getattr(error, "exit_code", Exit.ERROR)))
    if code is not None:
        raise Ended(code) from error


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process has ended or is late, as far as torch tells."""
    return isinstance(error, dist.DistError) or bool(LOST.search(str(error)))


def leave(code: int) -> NoReturn:
    """Ends this process, at once if other processes may have left it alone in a group."""
    if not dist.is_initialized():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
