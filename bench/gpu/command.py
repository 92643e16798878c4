"""All checks and measurements that need a GPU, in one command: `make gpu`, or `python -m bench.gpu`.

Stages, each a process with a time limit and a log under OUT: build, doctor, tests, kernels against their peers, a full
update step, Nsight Compute, a training run. A failed stage does not stop the others; the table comes last, and the exit
code is 1 if any failed. Nothing is downloaded: wheels of peers in WHEELS are installed first, other peers are listed as
"not installed".
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mgrpo_kernels.operations import OPERATIONS

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 77  # exit code of a stage that does not apply here
NEEDED = {"train": ("tyro", "rich", "transformers", "safetensors", "datasets", "math_verify", "matplotlib")}
# In order of importance, because the time limit cuts off the last.
FIRST = ("token_logprob", "ema_update_", "logits_grpo_loss", "linear_token_logprob", "linear_grpo_loss", "grpo_loss")
KERNELS = [op.rstrip("_") for op in sorted(OPERATIONS, key=lambda op: [*FIRST, op].index(op))]
TAIL_LINES = 12
LEAST_S = 5  # least time left to begin a stage


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One process."""

    name: str
    command: Sequence[str]
    limit_s: float
    needs: tuple[str, ...] = ()
    """Modules that it needs; skipped without them."""
    gpu_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a stage."""

    name: str
    state: str
    """ok | FAILED | skipped"""
    seconds: float
    detail: str


def stages(out: Path, device: str, wheels: Path) -> list[Stage]:
    """The stages; on a CPU with tiny shapes, to try the command itself."""
    python = sys.executable
    tiny = device == "cpu"
    install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    records = out / "records"
    found = []
    if wheels.is_dir() and any(wheels.glob("*.whl")):
        found.append(Stage(name="wheels", command=[*install, *map(str, sorted(wheels.glob("*.whl")))], limit_s=60))
    build = [*install, "--no-build-isolation", "--editable", "."]
    bench = ["--device", device, "--record", "--record-dir", str(records), "--bench-seconds", "0.5", "-q"]
    bench += ["--shapes", "tiny"] * tiny
    files = [f"bench/kernels/test_{name}.py" for name in (KERNELS[-4:] if tiny else KERNELS)]
    # In the folder of the same device's times, by which bench.verified orders backends.
    folder = importlib.import_module("bench.harness.measure" if tiny else "bench.harness.cuda").slug()
    tests = ["tests/kernels/test_on_device.py", "-q", "--verify-record", str(records / folder)]
    train = [
        "arithmetic",
        "--run-dir",
        str(out / f"run_{time.time():.0f}"),
        "--steps",
        "2" if tiny else "60",
        "--model.device",
        device,
    ]
    update = ["--device", device, "--out", str(out / "update_step.json")]
    return [
        *found,
        Stage(name="build", command=build, limit_s=240, gpu_only=True),
        Stage(
            name="doctor", command=[python, "-m", "mgrpo.doctor", "--device", device], limit_s=60, needs=NEEDED["train"]
        ),
        Stage(name="tests", command=[python, "-m", "pytest", *([] if tiny else ["-m", "gpu"]), *tests], limit_s=150),
        Stage(
            name="kernels", command=[python, "-m", "pytest", *files, *bench], limit_s=240, needs=("pytest_benchmark",)
        ),
        Stage(
            name="verified",
            command=[python, "-m", "bench.verified", "--records", str(records)],
            limit_s=30,
            gpu_only=True,
        ),
        Stage(
            name="update step",
            command=[python, "-m", "bench.training.update_step", *update],
            limit_s=120,
            needs=("transformers",),
        ),
        Stage(
            name="ncu",
            command=[python, "-m", "bench.gpu.ncu", "--out", str(out / "ncu.json")],
            limit_s=90,
            gpu_only=True,
        ),
        Stage(name="training", command=[python, "-m", "mgrpo.train", *train], limit_s=90, needs=NEEDED["train"]),
    ]


def run(stage: Stage, log: Path, limit_s: float) -> Outcome:
    """Runs a stage in a separate process group, all of which ends at the limit."""
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Outcome(
                name=stage.name, state="FAILED", seconds=limit_s, detail=f"stopped at its limit of {limit_s:.0f} s"
            )
    seconds = time.monotonic() - start
    lines = log.read_text(errors="replace").strip().splitlines()
    last = lines[-1].strip() if lines else ""
    state = "ok" if code == 0 else "skipped" if code == SKIPPED else "FAILED"
    return Outcome(
        name=stage.name, state=state, seconds=seconds, detail=last if code in (0, SKIPPED) else f"exit {code}: {last}"
    )


def why_not(stage: Stage, device: str, left_s: float) -> str | None:
    """The reason to skip a stage; None if there is none."""
    if stage.gpu_only and device == "cpu":
        return "needs a GPU"
    if missing := [name for name in stage.needs if importlib.util.find_spec(name) is None]:
        return f"not installed: {', '.join(missing)}"
    return f"{left_s:.0f} s are left" if left_s < LEAST_S else None


def run_all(todo: Sequence[Stage], out: Path, device: str, budget_s: float) -> list[Outcome]:
    """Runs every stage for which there are time, modules and a device."""
    deadline = time.monotonic() + budget_s
    outcomes = []
    for index, stage in enumerate(todo):
        left = deadline - time.monotonic()
        if reason := why_not(stage, device, left):
            outcomes.append(Outcome(name=stage.name, state="skipped", seconds=0, detail=reason))
            continue
        print(f"== {stage.name}: {' '.join(stage.command)}", flush=True)
        log = out / f"{index:02d}_{stage.name.replace(' ', '_')}.log"
        outcome = run(stage, log, min(stage.limit_s, left))
        outcomes.append(outcome)
        print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]), flush=True)
    return outcomes


def summary(outcomes: Sequence[Outcome], out: Path) -> str:
    """The tables of the records, then the table of stages."""
    lines = []
    for path in sorted((out / "records").rglob("*.json")):
        lines.append(f"record {path.relative_to(out)}")
    lines += ["", "| stage | state | s | detail |", "|---|---|---|---|"]
    for o in outcomes:
        lines.append(f"| {o.name} | {o.state} | {o.seconds:.0f} | {o.detail.replace('|', '/')[:150]} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if a stage failed."""
    parser = argparse.ArgumentParser(
        "python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny, to try the command")
    parser.add_argument("--minutes", type=float, default=8.75, help="for all stages together")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    parser.add_argument("--wheels", type=Path, default=Path(os.environ.get("MGRPO_WHEELS", ROOT / "wheels")))
    parser.add_argument("--only", nargs="+", help="names of stages")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    todo = stages(out, args.device, args.wheels)
    if args.only:
        todo = [stage for stage in todo if stage.name in args.only]
    outcomes = run_all(todo, out, args.device, args.minutes * 60)
    text = summary(outcomes, out)
    (out / "summary.md").write_text(text)
    print(text)
    return int(any(outcome.state == "FAILED" for outcome in outcomes))
