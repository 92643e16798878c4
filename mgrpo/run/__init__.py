"""A run on a disk: steps, checkpoints, resume, and the checks before the first step."""

from mgrpo.errors import Exit
from mgrpo.run.loop import run

__all__ = ["Exit", "run"]
