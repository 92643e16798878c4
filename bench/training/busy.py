"""Time of a training step on an idle machine and beside busy processes: `python -m bench.training.busy`.

Compares two ways of waiting at barriers: the commands' own, and libgomp's, which spins. In each round each runs alone
and beside the busy processes; a row is the median over rounds of the median `step_s`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
WARM_UP = 2
# libgomp's default, named explicitly to override the commands' choice.
WAYS = {"sleep": {}, "spin": {"GOMP_SPINCOUNT": "300000"}}


@contextmanager
def busy(num: int) -> Iterator[None]:
    """Runs `num` single-thread processes that only compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def step_s(way: str, steps: int, flags: list[str]) -> float:
    """Median seconds of a step, in a separate run."""
    environment = {name: v for name, v in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= WAYS[way] | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mgrpo.train", "arithmetic", "--run-dir", f"{folder}/run"]
        command += ["--steps", str(steps + WARM_UP), "--checkpoint.every", "0", "--eval.every", "0", *flags]
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["step_s"] for row in rows[WARM_UP:])


def main() -> None:
    """Prints a row for each way of waiting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds")
    parser.add_argument("--steps", type=int, default=20, help="steps of a run, after two for warm-up")
    parser.add_argument("--busy", type=int, default=2, help="other processes")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    args, flags = parser.parse_known_args()
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.rounds):
        for num in (0, args.busy):
            for way in args.ways:
                with busy(num):
                    found.setdefault((way, num), []).append(step_s(way, args.steps, flags))
                print(f"{way}, {num} busy: {found[way, num][-1]:.3f} s", file=sys.stderr, flush=True)
    print(f"| threads that wait | idle, s | beside {args.busy} busy processes, s | times idle |\n|---|---|---|---|")
    for way in args.ways:
        idle, beside = (statistics.median(found[way, num]) for num in (0, args.busy))
        print(f"| {way} | {idle:.3f} | {beside:.3f} | {beside / idle:.1f} |")


if __name__ == "__main__":
    main()
