"""The launcher on another program: python launch_program.py PROCESSES RESTARTS RUN_DIR PROGRAM [ARGUMENTS]."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mgrpo.distributed import launch

if __name__ == "__main__":
    processes, restarts, run_dir, *program = sys.argv[1:]
    launch.STOP_S = float(os.environ.get("STOP_S", launch.STOP_S))
    command = [sys.executable, *program]
    sys.exit(launch.start_workers(command, int(processes), Path(run_dir), max_restarts=int(restarts)))
