"""Nsight Compute on one launch of each memory-bound kernel: `python -m bench.gpu.ncu [--out FILE]`.

Runs itself under `ncu` as the profiled program, and prints duration, share of the DRAM bandwidth, registers, occupancy,
instructions and the reasons of warp stalls. The clocks are not changed. Exits with 77 and a message if ncu is missing
or cannot read the counters.
T tokens, V vocabulary, N sequences.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import mgrpo_kernels as K
from bench.harness.case import device_backends
from bench.kernels.eager import packed_batch, peaked

SKIPPED = 77
NUM, ROWS, VOCABULARY = 8, 8_192, 151_936
EMA_TENSORS, EMA_SIZE = 32, 2**24
STALL = ("smsp__average_warps_issue_stalled_", "_per_issue_active.ratio")
METRICS = {
    "gpu__time_duration.sum": ("us", 1e-3),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("DRAM %", 1.0),
    "dram__bytes_read.sum": ("read MiB", 2**-20),
    "dram__bytes_write.sum": ("written MiB", 2**-20),
    "launch__registers_per_thread": ("registers", 1.0),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("occupancy %", 1.0),
    "smsp__inst_executed.sum": ("M instructions", 1e-6),
}


def calls(backend: str) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Memory-bound operations: each function makes its inputs and returns the call to profile."""

    def token_logprob(grad: bool) -> Callable[[], Any]:
        logits = peaked(ROWS, VOCABULARY).to(torch.bfloat16).requires_grad_(grad)
        targets = torch.randint(VOCABULARY, (ROWS,))
        upstream = (torch.randn(ROWS), torch.randn(ROWS))

        def call() -> Any:
            out = K.token_logprob(logits, targets, inplace_backward=grad, backend=backend)[:2]
            return torch.autograd.grad(out, logits, upstream) if grad else out

        return call

    def logits_grpo_loss() -> Callable[[], Any]:
        logits = peaked(ROWS, VOCABULARY).to(torch.bfloat16).requires_grad_()
        targets = torch.randint(VOCABULARY, (ROWS,))
        advantage, mask, cu_seqlens = packed_batch(NUM, ROWS)

        def call() -> Any:
            loss = K.logits_grpo_loss(logits, targets, advantage, mask, cu_seqlens=cu_seqlens, backend=backend).loss
            return torch.autograd.grad(loss, logits)

        return call

    def ema_update(policy: torch.dtype, momentum: torch.dtype, rounding: str) -> Callable[[], Any]:
        old = [torch.randn(EMA_SIZE).to(momentum) for _ in range(EMA_TENSORS)]
        new = [torch.randn(EMA_SIZE).to(policy) for _ in range(EMA_TENSORS)]
        return lambda: K.ema_update_(old, new, 0.99, rounding=rounding, seed=1, backend=backend)

    fp32, bf16 = torch.float32, torch.bfloat16
    return {
        "token_logprob, forward": lambda: token_logprob(False),
        "token_logprob, both": lambda: token_logprob(True),
        "logits_grpo_loss, both": logits_grpo_loss,
        "ema_update_, fp32 to fp32": lambda: ema_update(fp32, fp32, "nearest"),
        "ema_update_, bf16 to fp32": lambda: ema_update(bf16, fp32, "nearest"),
        "ema_update_, bf16 to bf16 stochastic": lambda: ema_update(bf16, bf16, "stochastic"),
    }


def profiled() -> None:
    """The program under ncu: a warm-up call, then one in the profiled range."""
    for backend in device_backends("token_logprob", "cuda"):
        if backend == "reference":
            continue
        for name, make in calls(backend).items():
            try:
                with torch.device("cuda"):
                    call = make()
                call()
                torch.cuda.synchronize()
            except (ValueError, RuntimeError) as error:
                print(f"{backend}: {name} left out: {str(error).splitlines()[0]}", flush=True)
                continue
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            print(f"{backend}: {name}", flush=True)
            del call
            torch.cuda.empty_cache()


def command(ncu: str, log: Path) -> list[str]:
    """The command line of ncu."""
    return [
        ncu,
        "--csv",
        "--page=raw",
        "--print-units=base",
        "--profile-from-start=off",
        "--clock-control=none",
        "--target-processes=all",
        "--section=WarpStateStats",
        f"--metrics={','.join(METRICS)}",
        f"--log-file={log}",
        sys.executable,
        "-m",
        "bench.gpu.ncu",
        "--profiled",
    ]


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def parse(text: str) -> list[dict[str, Any]]:
    """Rows of ncu's raw CSV page: the kernel, METRICS by their short names, and the three longest stalls.

    The second line holds units; lines that start with == are not part of the table.
    """
    rows = list(csv.reader(line for line in text.splitlines() if line and not line.startswith("==")))
    while rows and "Kernel Name" not in rows[0]:
        rows.pop(0)
    if not rows:
        return []
    header, found = rows[0], []
    for row in rows[1:]:
        values = dict(zip(header, row, strict=False))
        if not values.get("ID"):
            continue
        numbers = {name: _number(values.get(name, "")) for name in METRICS}
        waits = {
            name.removeprefix(STALL[0]).removesuffix(STALL[1]): number
            for name, value in values.items()
            if name.startswith(STALL[0]) and name.endswith(STALL[1]) and "not_issued" not in name
            if (number := _number(value)) is not None
        }
        found.append(
            {
                "kernel": values["Kernel Name"],
                **{short: None if (n := numbers[name]) is None else n * by for name, (short, by) in METRICS.items()},
                "waits": dict(sorted(waits.items(), key=lambda item: -item[1])[:3]),
            }
        )
    return found


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as text."""
    shorts = [short for short, _ in METRICS.values()]
    lines = ["kernel".ljust(44) + "".join(short.rjust(16) for short in shorts) + "  warps wait for (cycles an issue)"]
    for row in rows:
        cells = "".join(("-" if row[short] is None else f"{row[short]:,.1f}").rjust(16) for short in shorts)
        waits = ", ".join(f"{name} {cycles:.1f}" for name, cycles in row["waits"].items())
        lines.append(f"{row['kernel'][:43]:44s}{cells}  {waits}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("out/ncu.json"), help="JSON file of the rows, its CSV beside it"
    )
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.profiled:
        profiled()
        return 0
    ncu = shutil.which("ncu")
    if ncu is None or not torch.cuda.is_available():
        print("ncu is not on the PATH" if ncu is None else "no CUDA device is available")
        return SKIPPED
    args.out.parent.mkdir(parents=True, exist_ok=True)
    log = args.out.with_suffix(".csv")
    log.unlink(missing_ok=True)
    done = subprocess.run(command(ncu, log), capture_output=True, text=True, check=False)
    text = log.read_text() if log.exists() else ""
    rows = parse(text)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(line for line in done.stdout.splitlines() if " left out: " in line))
    if not rows:
        said = [
            line for line in (text + done.stdout + done.stderr).splitlines() if "==ERROR==" in line or "rror" in line
        ]
        print(
            f"ncu exited with {done.returncode} and read nothing: {said[0].strip() if said else 'it does not say why'}"
        )
        return SKIPPED
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
