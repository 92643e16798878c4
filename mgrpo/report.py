"""Report of one or several runs, report.html and plots/*.png: `python -m mgrpo.report RUN_DIR [RUN_DIR ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from mgrpo.config import HomePath
from mgrpo.errors import ConfigError, InputError
from mgrpo.observe.report import write_report
from mgrpo.process.command_line import read_command_line
from mgrpo.process.output import protect_output


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """Writes report.html and plots/*.png of one run, or of several drawn together."""

    runs: tyro.conf.Positional[tuple[HomePath, ...]]
    """Run directories."""
    out: HomePath | None = None
    """Folder to write. None is the directory of a single run, or the folder `report` beside several."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 2 for bad input, or 6 if the report cannot be written."""
    protect_output()
    arguments = sys.argv[1:] if argv is None else argv
    try:
        args = read_command_line(ReportArgs, arguments, command="report", prog="python -m mgrpo.report").require()
        if str(args.out).startswith("~"):
            raise InputError(f"report: --out must begin with the home of a known user, got {args.out}.")
        print(write_report(args.runs, args.out))
    except (ConfigError, InputError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"report: could not be written: {error}.", file=sys.stderr)
        return 6
    return 0


if __name__ == "__main__":
    sys.exit(main())
