"""`python -m mgrpo.train [PRESET] [--flags]`: label-free reinforcement learning from the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

from mgrpo.process.output import protect_output, silence_output
from mgrpo.process.signals import end_early, ignore_warnings

if __name__ == "__main__":  # the imports below take seconds
    protect_output()
    end_early()

# isort: split
from mgrpo.config import Config
from mgrpo.config.renamed import RENAMED
from mgrpo.config.run import Unchecked, combination_problems
from mgrpo.distributed.ending import leave
from mgrpo.distributed.environment import launcher_problems
from mgrpo.distributed.world import World, find_world
from mgrpo.errors import ConfigError, Exit
from mgrpo.models.files import quiet_transformers
from mgrpo.presets import PRESETS, make_preset
from mgrpo.process.command_line import read_command_line
from mgrpo.run.loop import run
from mgrpo.run.plan import print_plan
from mgrpo.run.preflight import find_problems, try_start
from mgrpo.run.processes import CLEAR, count_processes, show, start, take_part
from mgrpo.run.resume import resume_problems, resumed_config

DESCRIPTION = f"""M-GRPO: label-free reinforcement learning of language models with a momentum anchor.

The first argument names a preset, one of {", ".join(PRESETS)}; flags change it. The defaults are those of the preset.
"""


def parse(arguments: Sequence[str]) -> Config:
    """Parses preset and flags; with --resume, flags change the configuration of the run in --run-dir.

    Raises:
        ConfigError: with every problem, in a dry run also those of the inputs.
    """
    arguments = list(arguments)
    preset = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    before = None
    if "--resume" in arguments and (run_dir := _value_of("--run-dir", arguments)):
        before = resumed_config(Path(os.path.expanduser(run_dir)))
        # Options of one call, not of the run.
        before = before and replace(
            before, stop_after=None, resume=False, resume_extend=False, dry_run=False, dry_run_memory=None
        )
    if before and preset not in (None, before.preset):
        raise ConfigError([f"resume: PRESET must be {before.preset}, as the run was started, got {preset}."])
    line = read_command_line(
        Unchecked,
        arguments,
        command="config",
        prog=f"python -m mgrpo.train {preset or '[PRESET]'}",
        default=Unchecked(**vars(before or make_preset(preset or "arithmetic"))),
        renamed=RENAMED,
        description=DESCRIPTION,
    )
    draft = line.options
    assert draft is not None
    problems = line.with_others(combination_problems(draft) + (resume_problems(draft, before) if before else []))
    if not problems:
        return Config(**vars(draft))
    if draft.dry_run:
        problems = line.with_others([*problems, *find_problems(draft)])
    raise ConfigError(problems)


def _value_of(name: str, arguments: Sequence[str]) -> str | None:
    """The last value of a flag, given as `--flag value` or `--flag=value`, with `-` or `_` as in tyro."""
    found = None
    for i, argument in enumerate(arguments):
        given, equals, value = argument.partition("=")
        if given.replace("_", "-") == name:
            found = value if equals else next(iter(arguments[i + 1 :]), None)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    protect_output()
    quiet_transformers()
    arguments, world = sys.argv[1:] if arguments is None else arguments, find_world()
    if problems := launcher_problems():  # the rank may be wrong, so that each process says so
        show(ConfigError(problems), world)
        return Exit.BAD_INPUT
    try:
        config = _parse_once(arguments, world)
        if config.dry_run:
            return _rehearse(config) if world.is_first else Exit.DONE
        if world.size > 1:
            return take_part(config)
        if (processes := count_processes(config)) > 1:
            return start(config, arguments, processes)
        return run(config)
    except CLEAR as error:
        if world.is_first:
            show(error, world)
        return error.exit_code


def _parse_once(arguments: Sequence[str], world: World) -> Config:
    """Parses the arguments; of several processes with the same ones only the first says what is wrong with them."""
    if world.is_first:
        return parse(arguments)
    silence_output()
    with open(os.devnull, "w") as null, redirect_stderr(null):
        return parse(arguments)


def _rehearse(config: Config) -> int:
    """Checks everything and starts nothing."""
    if problems := find_problems(config):
        raise ConfigError(problems)
    plan = print_plan(config)
    if plan.problems:
        raise ConfigError(plan.problems)
    if plan.untried:
        print(f"The model is not loaded and tried: {plan.untried}.")
    else:
        try_start(config)
    return Exit.DONE


if __name__ == "__main__":
    code = main()
    ignore_warnings()
    leave(code)
