"""`mgrpo.train` with a fault, as one of several processes.

    python world_train.py FAULT ARGUMENTS

FAULT is none, or KIND:RANK:STEP, which befalls this rank within this step of the first attempt, in step 0 before the
processes share a run directory: raise an error, fail as the engine, be slow, a signal by its name, or full=BYTES, a
disk on which no file of this rank may become longer.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time

from mgrpo.distributed.world import World, find_world
from mgrpo.errors import EngineError
from mgrpo.process.output import protect_output
from mgrpo.process.signals import end_early

if __name__ == "__main__":
    protect_output()
    end_early()

from mgrpo.distributed.ending import leave
from mgrpo.process.signals import ignore_warnings
from mgrpo.train import main
from mgrpo.training.grader import Grader

judge = Grader.assign_credit


def inject(fault: str) -> None:
    """Makes the fault happen after the rollouts of its step."""
    kind, rank, step = fault.split(":")
    if int(rank) != find_world().rank or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return

    def assign_credit(self, batch, logprobs):
        if batch.step == int(step):
            befall(kind)
        return judge(self, batch, logprobs)

    def broadcast(self, value):
        befall(kind)

    if step == "0":
        World.broadcast = broadcast
    Grader.assign_credit = assign_credit


def befall(kind: str) -> None:
    if kind == "raise":
        raise ValueError("a fault of rank " + str(find_world().rank))
    if kind == "engine":
        raise EngineError("engine: a fault of one rank.")
    if kind == "slow":
        time.sleep(3)
        return
    if kind.startswith("full="):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(kind.removeprefix("full=")), resource.RLIM_INFINITY))
        return
    os.kill(os.getpid(), getattr(signal, kind))


if __name__ == "__main__":
    if sys.argv[1] != "none":
        inject(sys.argv[1])
    code = main(sys.argv[2:])
    ignore_warnings()
    leave(code)
