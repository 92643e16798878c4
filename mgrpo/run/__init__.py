"""Runs training in a run directory: checks before the first step, steps, checkpoints, resume."""

from mgrpo.errors import Exit
from mgrpo.run.loop import run

__all__ = ["Exit", "run"]
