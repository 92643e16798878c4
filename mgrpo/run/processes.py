"""A run of several processes: starts them, or takes part as one of them."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mgrpo.config import Config
from mgrpo.config.run import process_problems
from mgrpo.distributed.ending import LOST_S, is_lost
from mgrpo.distributed.environment import number
from mgrpo.distributed.launch import ROLE, start_workers
from mgrpo.distributed.world import World, find_world, join_world
from mgrpo.errors import CheckpointError, ConfigError, Ended, EngineError, Exit, InputError, Interrupted, StorageError
from mgrpo.models.device import pick_device
from mgrpo.process.display import make_console
from mgrpo.process.signals import end_with_parent
from mgrpo.run.directory import directory_of, next_start
from mgrpo.run.loop import INTERRUPTED, run
from mgrpo.run.preflight import find_problems, num_processes

CLEAR = (ConfigError, InputError, CheckpointError, EngineError, StorageError)
"""Errors whose message says all; of others the traceback is shown."""


def count_processes(config: Config) -> int:
    """Processes that the command has to start, 1 for none; ConfigError if the machine lacks the GPUs for them."""
    count, device = num_processes(config), pick_device(config.model.device)
    if count == 1:
        return 1
    problems = process_problems(config, count)
    if device.index is not None:
        problems.append(f"config: --model.device must be auto, cpu or cuda with {count} processes, got {device}.")
    if device.type == "cuda" and count > (gpus := torch.cuda.device_count()):
        problems.append(f"config: --distributed.processes must be at most {gpus}, the GPUs here, got {count}.")
    if problems:
        raise ConfigError(problems)
    return count


def start(config: Config, arguments: Sequence[str], processes: int) -> int:
    """Checks the configuration, starts the processes, and returns the exit code of the run."""
    if problems := find_problems(config):
        raise ConfigError(problems)
    run_dir = directory_of(config)
    named = [] if config.run_dir else ["--run-dir", str(run_dir)]
    command = [sys.executable, "-m", "mgrpo.train", *arguments, *named]
    print(f"Starting {processes} processes ...", flush=True)
    code = start_workers(command, processes, run_dir, max_restarts=config.distributed.max_restarts)
    if line := next_start(run_dir, code):
        print(line, file=sys.stderr)
    return code


def take_part(config: Config) -> int:
    """Runs as one of the processes that a launcher has started, and returns the exit code."""
    world, run_dir = find_world(), str(directory_of(config))
    end_with_parent()
    try:
        world = _join(config, world)
        run_dir = world.broadcast(run_dir)
        # After a restart the run goes on.
        again = number("TORCHELASTIC_RESTART_COUNT", 0) > 0 and (Path(run_dir) / "config.json").is_file()
        code = run(replace(config, run_dir=run_dir, resume=config.resume or again), world)
        world.close()
        return code
    except Ended as end:
        if isinstance(end.__cause__, Interrupted):
            print(f"{INTERRUPTED}; start with --resume --run-dir {run_dir}", file=sys.stderr)
        elif end.__cause__:
            if os.environ.get("ROLE_NAME") != ROLE and (line := next_start(Path(run_dir), end.exit_code)):
                end.__cause__.add_note(line)  # else the launcher says it, after its last restart
            show(end.__cause__, world)
        return end.exit_code
    except Exception as error:  # before the processes share a run directory
        if not world.is_first or is_lost(error):
            time.sleep(LOST_S)  # another may fail alike or be the cause; the launcher then ends this process
        if world.is_first or not is_lost(error):
            show(error, world)
        return getattr(error, "exit_code", Exit.ERROR)


def _join(config: Config, found: World) -> World:
    """The world with its process groups; ConfigError if the launcher's world does not fit the configuration."""
    c = config.distributed
    problems = process_problems(config, found.size)
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        problems.append(
            f"run: WORLD_SIZE is {found.size}, so {', '.join(missing)} must be set too. "
            "Start with torchrun, or with --distributed.processes."
        )
    if problems:
        raise ConfigError(problems)
    return join_world(pick_device(config.model.device).type, replicate=c.replicate, timeout_s=c.timeout_s)


def show(error: BaseException, world: World) -> None:
    """Prints an error: its message if that is clear, else the traceback and the rank."""
    console = make_console(stderr=True)
    if isinstance(error, CLEAR):
        text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    else:
        text = f"rank {world.rank} of {world.size}:\n{''.join(traceback.format_exception(error))}".rstrip()
    console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
