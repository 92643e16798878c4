"""M-GRPO: label-free reinforcement learning with a momentum anchor."""

import sys

from mgrpo import moved
from mgrpo.process.threads import wait_passively

__version__ = "0.1.0"

# `python -m mgrpo.train` looks for its module now, and has not imported torch. A program that imports this as a library
# keeps its own threads as they are.
if sys.argv[:1] == ["-m"]:
    wait_passively()

moved.install()
