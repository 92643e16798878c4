"""Starts the processes of a run on this machine by torch elastic, and ends with the exit code of the run."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from mgrpo.distributed.ending import claim, read_exit
from mgrpo.errors import Exit
from mgrpo.process.signals import REQUESTS, WARNINGS, active_warnings

# Without it a restarted worker finds the addresses of dead ones in the store that all attempts share.
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
# ROLE_NAME in the environment of the workers.
ROLE = "mgrpo"
# After the first failure the others have this time to end by themselves.
STOP_S = 20.0
# What another start may cure; other codes are final.
RESTARTED = (Exit.ERROR, Exit.ENGINE)
# Decorators hide the signatures of its methods from type checkers.
ElasticAgent: Any = LocalElasticAgent


def start_workers(command: Sequence[str], processes: int, run_dir: Path, *, max_restarts: int = 0) -> int:
    """Runs a command in several processes, which find their places in the environment as under torchrun.

    Signals go on to the workers, which save and end. After a failure of one all end; the first error decides, by
    exit.json in the run directory.

    Args:
        command: program and arguments of each worker.
        processes: number of workers.
        run_dir: the run directory.
        max_restarts: times that all are started again after one was killed or has failed.

    Returns:
        The exit code of the run.
    """
    os.environ.setdefault(OWN_STORE, "1")
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are forwarded
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    place = RendezvousParameters(
        backend="c10d",
        endpoint="127.0.0.1:0",
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        local_addr="127.0.0.1",
    )
    with tempfile.TemporaryDirectory(prefix="mgrpo-") as logs:
        spec = WorkerSpec(
            role=ROLE,
            local_world_size=processes,
            entrypoint=command[0],
            args=tuple(argument.replace("$", "$$") for argument in command[1:]),  # a template of torch
            rdzv_handler=get_rendezvous_handler(place),
            max_restarts=max_restarts,
            monitor_interval=0.1,
            local_addr="127.0.0.1",
        )
        agent = Agent(spec, logs_specs=DefaultLogsSpecs(log_dir=logs), run_dir=run_dir)
        for number in (*REQUESTS, *active_warnings()):
            signal.signal(number, agent.forward)
        try:
            failed = agent.run().is_failed()
        finally:
            spec.rdzv_handler.shutdown()
    return agent.code if failed else Exit.DONE


class Agent(ElasticAgent):
    """Watches the workers, forwards signals to them, and restarts them only where that may help.

    Attributes:
        code: exit code of the run, once a worker has failed.
    """

    def __init__(self, spec: WorkerSpec, logs_specs: DefaultLogsSpecs, *, run_dir: Path):
        super().__init__(spec, logs_specs, exit_barrier_timeout=10)
        self.run_dir, self.code = run_dir, int(Exit.ERROR)
        self._pids: dict[int, int] = {}  # by local rank, which is the rank
        self._asked: list[int] = []
        self._started = 0.0

    def forward(self, number: int, frame: FrameType | None = None) -> None:
        """Passes a signal on to every worker."""
        self._asked.append(number)
        self._signal(number)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # File systems round times down.
        self._started = time.time() - 0.01
        self._pids = super()._start_workers(worker_group)
        for number in self._asked:
            self._signal(number)
        return self._pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if failed := {rank: status for rank, pid in self._pids.items() if (status := _status(pid))}:
            # Of several at once: a signal is no consequence of another's error, and rank 0 decides for all.
            self._end(*min(failed.items(), key=lambda item: (item[1] >= 0, item[0])))
        return super()._monitor_workers(worker_group)

    def _end(self, rank: int, status: int) -> None:
        """Ends the others after the first failure, and decides on a restart."""
        code = read_exit(self.run_dir, since=self._started)
        if code is None and -status in (*REQUESTS, *WARNINGS):  # before it could handle them, with nothing to save
            code = Exit.INTERRUPTED
        elif code is None and status < 0:
            code = Exit.ERROR
            message = f"rank {rank} was ended by {_signal_name(-status)}"
            claim(self.run_dir, code, rank=rank, error=message, since=self._started)
            _say(message + ".")
        self.code = status if code is None else int(code)
        self._signal(signal.SIGTERM)
        end = time.monotonic() + STOP_S
        while time.monotonic() < end and None in map(_status, self._pids.values()):
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        if self._asked or self.code not in RESTARTED:
            self._remaining_restarts = 0
        elif left := self._remaining_restarts:
            most = self._worker_group.spec.max_restarts
            _say(f"All processes start again, {most - left + 1} of {most} times, from the newest checkpoint.")

    def _signal(self, number: int) -> None:
        """Sends a signal to every worker that runs."""
        for pid in self._pids.values():
            if _status(pid) is None:
                os.kill(pid, number)


def _status(pid: int) -> int | None:
    """Exit code of a child, negative for a signal, None while it runs; leaves it to be waited for."""
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # waited for already
        return 0
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _signal_name(number: int) -> str:
    """The name of a signal, or its number where it has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _say(message: str) -> None:
    """Prints a line for the user."""
    print(message, file=sys.stderr, flush=True)
