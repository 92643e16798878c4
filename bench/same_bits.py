"""Checks that another commit trains to the same bits: `python -m bench.same_bits COMMIT`.

The commit is built beside this checkout, on the same machine. Both run every preset for a few steps on the built-in
task, with the processor's widest instruction sets; weights, momentum, optimiser and metrics must be equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pybind11
import torch
from safetensors.torch import load_file

from mgrpo.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
ISAS = ("avx512", "avx2")
# The built-in task instead of a preset's downloads, and responses of a few tokens.
FLAGS = ["--model.path", "builtin:arithmetic", "--data.train", "arithmetic:2048:3-5:0", "--rollout.max-new-tokens"]
FLAGS += ["32", "--data.probe", "arithmetic:32:3-5:1000003", "--eval.every", "10", "--checkpoint.every", "0"]
FLAGS += ["--monitor.retention-every", "5", "--answer.equivalence", "exact", "--log.backends"]


def build(commit: str, folder: Path) -> str:
    """Writes a commit's tree into a folder and builds its CPU kernels; returns the commit's full name."""
    name = subprocess.run(["git", "rev-parse", commit], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    name = name.strip()
    if (folder / "built").is_file() and (folder / "built").read_text() == name:
        return name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", name], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "x"], cwd=folder, input=archive, check=True)
    cmake, work = Path(sys.executable).with_name("cmake"), folder / "build"
    configure = [cmake, "-S", folder, "-B", work, f"-DPython_EXECUTABLE={sys.executable}", "-DMGRPO_CUDA=OFF"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'mgrpo_kernels'}"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", work], check=True, stdout=subprocess.DEVNULL)
    (folder / "built").write_text(name)
    return name


def available(isa: str) -> bool:
    """Whether this processor has an instruction set."""
    code = "from mgrpo_kernels import backends; raise SystemExit(not backends()['cpu'].available)"
    return (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"MGRPO_CPU_ISA": isa}).returncode == 0
    )


def train(root: Path, run_dir: Path, preset: str, isa: str, steps: int) -> dict[str, str]:
    """Digests of all tensors and rows of metrics of a run of the tree at `root`."""
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, "-m", "mgrpo.train", preset, *FLAGS, "--steps", str(steps), "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": str(root), "MGRPO_CPU_ISA": isa}
    done = subprocess.run(
        [*command, "--run-dir", str(run_dir)], cwd=root, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(
            f"{preset} of {root} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    found = {}
    for file in sorted((run_dir / "checkpoints" / f"step_{steps}").rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found[f"{file.parent.name}/{file.stem}/{name}"] = digest(
                tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = {k: v for k, v in json.loads(line).items() if not k.endswith("_s")}
        found[f"metrics of step {row['step']}"] = digest(json.dumps(row, sort_keys=True).encode())
    return found


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def main() -> int:
    """Prints a line for each preset and instruction set; returns 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the commit to compare with this checkout")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "same_bits", help="folder of the build")
    args = parser.parse_args()
    other = args.folder / "tree"
    name = build(args.commit, other)
    different = 0
    for isa in filter(available, ISAS):
        for preset in args.presets:
            kept = args.folder / f"{name}-{preset}-{isa}-{args.steps}.json"
            if not kept.is_file():
                kept.write_text(json.dumps(train(other, args.folder / "run", preset, isa, args.steps)))
            before: dict[str, Any] = json.loads(kept.read_text())
            now = train(ROOT, args.folder / "run", preset, isa, args.steps)
            unequal = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
            different += bool(unequal)
            result = f"{len(unequal)} of {len(now)} differ: {sorted(unequal)[:4]}" if unequal else "equal"
            print(f"{preset} {isa}, {args.steps} steps, {len(now)} tensors and rows: {result}", flush=True)
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
