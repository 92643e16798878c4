"""Checks this machine: versions, kernels, engine, answer checker, extras. `python -m mgrpo.doctor`.

Letters: T tokens, D hidden, V vocabulary, B prompts, G rollouts a prompt.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from rich.markup import escape
from rich.table import Table

import mgrpo_kernels as K
from mgrpo.config import Config, DataConfig, LogConfig, ModelConfig, ObjectiveConfig, RolloutConfig
from mgrpo.errors import ConfigError, EngineError, InputError, StorageError, whole
from mgrpo.grading.checker import AnswerChecker
from mgrpo.models.device import pick_device
from mgrpo.models.files import quiet_transformers
from mgrpo.models.load import load_model
from mgrpo.process.command_line import read_command_line
from mgrpo.process.display import make_console
from mgrpo.process.output import protect_output
from mgrpo.process.threads import available_cpus, limit_threads
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.run.preflight import find_problems, record_problems, try_start
from mgrpo.tasks.arithmetic import make_model
from mgrpo.types import Sampling, WeightTag
from mgrpo_kernels.backends import resolve
from mgrpo_kernels.operations import OPERATIONS, Inputs, Samples, Sizes

PACKAGES = ("mgrpo", "torch", "transformers", "tokenizers", "safetensors", "datasets", "math-verify", "matplotlib")
EXTRAS = {
    "tensorboard": "pip install 'mgrpo[train]'",
    "math_verify": "pip install 'mgrpo[train]'",
    "wandb": "pip install 'mgrpo[wandb]'",
    "trackio": "pip install 'mgrpo[trackio]'",
    "peft": "pip install 'mgrpo[lora]'",
    "vllm": "pip install 'mgrpo[vllm]'",
    "flash_attn": "pip install 'mgrpo[flash-attn]' --no-build-isolation (needs a GPU)",
}
# The large inputs exceed the caches, as in a training run.
T, D, V, B, G = 256, 64, 65536, 128, 16
HEAD_V = 16384
EMA_SIZE = 2**24
ROOF_BYTES = 64 * 2**20
# On a GPU the same inputs are too fast to time and partly in its cache.
GPU_FACTOR = 8
# fp32 results must keep half of fp32's digits against fp64.
MAX_ERROR = torch.finfo(torch.float32).eps ** 0.5


class Check(NamedTuple):
    """The result of a check that training needs."""

    name: str
    works: bool
    detail: str


class Op(NamedTuple):
    """A call of a public op on `inputs`, which returns its outputs."""

    inputs: Inputs
    call: Callable[[Inputs, str], Sequence[torch.Tensor]]
    is_memory_bound: bool = True

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The floating-point dtypes of the inputs."""
        return tuple({tensor.dtype for tensor in self.inputs.values() if tensor.is_floating_point()})


class KernelResult(NamedTuple):
    """Error and time of one op on one backend."""

    op: str
    backend: str
    error: float | None  # largest |difference from fp64| / max(1, largest |fp64 result|)
    time_ms: float | None
    roof_share: float | None  # share of the memory bandwidth; None for compute-bound ops
    problem: str | None


def make_ops(device: torch.device) -> dict[str, Op]:
    """Every public op with fp32 inputs."""
    factor = GPU_FACTOR if device.type == "cuda" else 1
    samples = Samples(device, Sizes(T * factor, D, V, HEAD_V, B, G, EMA_SIZE * factor))
    return {name: Op(row.inputs(samples), row.call, row.is_memory_bound) for name, row in OPERATIONS.items()}


def check_kernel(name: str, op: Op, backend: str, gb_per_s: float) -> KernelResult:
    """Compares an op with its reference in fp64 and times its forward pass, median of 5.

    Args:
        name: name of the op.
        op: its inputs and call.
        backend: an available backend.
        gb_per_s: memory bandwidth of the device.
    """
    wide = {k: v.double() if v.is_floating_point() else v for k, v in op.inputs.items()}
    inputs = {k: v.clone() for k, v in op.inputs.items()}
    device = next(iter(inputs.values())).device
    try:
        exact, found = op.call(wide, "reference"), op.call(inputs, backend)
        pairs = [(a.double(), b.double()) for a, b in zip(exact, found, strict=True)]
        # The maximum of a tensor, because Python's max may ignore NaN.
        error = torch.stack([(a - b).abs().max() / a.abs().max().clamp_min(1) for a, b in pairs]).max().item()
        time_s = statistics.median(measure_times(lambda: op.call(inputs, backend), device))
    except (ValueError, RuntimeError) as error:
        return KernelResult(name, backend, None, None, None, whole(error))
    num_bytes = sum(t.nbytes for t in [*op.inputs.values(), *found])
    share = num_bytes / time_s / 1e9 / gb_per_s if op.is_memory_bound else None
    problem = None if error <= MAX_ERROR else f"error must be at most {MAX_ERROR:.1e}"
    return KernelResult(name, backend, error, 1e3 * time_s, share, problem)


@torch.no_grad()
def measure_times(call: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of each of 5 calls, after one warm-up call."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return times[1:]


def measure_roof(device: torch.device) -> float:
    """Memory bandwidth in GB/s of the fastest copy or in-place sum, bytes read plus bytes written."""
    num_bytes = ROOF_BYTES * (GPU_FACTOR if device.type == "cuda" else 1)
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.zeros_like(source)
    # For a copy some CPUs also read the target; an in-place sum reads it anyway.
    copy_s = min(measure_times(lambda: target.copy_(source), device))
    sum_s = min(measure_times(lambda: target.add_(source), device))
    return max(2 * num_bytes / copy_s, 3 * num_bytes / sum_s) / 1e9


def runs_on(name: str, op: Op, backend: str, device: torch.device) -> bool:
    """Whether a backend supports an op on a device."""
    try:
        resolve(name, device, backend, op.dtypes)
    except ValueError:
        return False
    return True


def check_needed() -> list[Check]:
    """Tries the engine, the answer checker and the shipped base model."""

    def generate() -> str:
        model = make_model()
        engine = TransformersEngine(model, eos_ids=(1,), pad_id=0, dtype=torch.float32, batch_size=4)
        engine.update_weights(model.state_dict(), WeightTag("policy", 0))
        sampling = Sampling(max_new_tokens=4)
        rollouts = engine.generate([[2, 3], [4]], 2, sampling, WeightTag("policy", 0))
        return f"{int(rollouts.lengths.sum())} tokens generated"

    def compare() -> str:
        with AnswerChecker(timeout_s=10) as checker:
            equal = checker.equivalent("(x+1)^2", "x^2+2x+1")
            if not equal or checker.timeouts or checker.failures:
                raise RuntimeError("math-verify did not find (x+1)^2 = x^2+2x+1. pip install 'mgrpo[train]'.")
        return "math-verify compares in a worker process"

    def load() -> str:
        loaded = load_model(ModelConfig(device="cpu"))
        return f"{sum(p.numel() for p in loaded.model.parameters()):,} parameters"

    tried = {"engine transformers": generate, "answer checker": compare, "base builtin:arithmetic": load}
    checks = []
    for name, action in tried.items():
        try:
            checks.append(Check(name, True, action()))
        except Exception as error:
            checks.append(Check(name, False, f"{type(error).__name__}: {error}"))
    return checks


def describe_machine(device: torch.device) -> dict[str, str]:
    """Versions, device, threads, free memory and free disk space."""
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed as a package"
    gpu = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}" if device.type == "cuda" else "no GPU used"
    facts["device"] = f"{device} ({gpu})"
    facts["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores, {available_cpus()} for this process"
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        facts["free memory"] = f"{os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    facts["free disk"] = f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB in {Path.cwd()}"
    return facts


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> Table:
    """A table of rows of plain text."""
    table = Table(*columns, title=title, title_justify="left", caption=caption, caption_justify="left")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _kernel_row(result: KernelResult, taken: str) -> list[str]:
    """One row of the table of kernels; `taken` is the backend that auto picks."""
    numbers = ((result.error, ".1e"), (result.time_ms, ".3f"), (result.roof_share, ".0%"))
    cells = ["" if number is None else format(number, spec) for number, spec in numbers]
    return [result.op, result.backend, "yes" if result.backend == taken else "", *cells, result.problem or "ok"]


@dataclass(frozen=True, kw_only=True)
class DoctorArgs:
    """Checks this machine; exits with 1 if something that training needs does not work."""

    device: str = "auto"
    """Device of the kernels: `auto` takes a GPU if there is one; or `cpu`, `cuda`, `cuda:1`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """A model to check as at the start of a run."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts to check as at the start of a run."""


def check_given(model: ModelConfig, data: DataConfig) -> list[str]:
    """The problems of a run with this model and these prompts, in the words of the run."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = Config(
                run_dir=folder,
                model=model,
                data=data,
                rollout=RolloutConfig(num_prompts=1),
                objective=ObjectiveConfig(kl_coef=0.0),
                log=LogConfig(backends=()),
            )
            if model == ModelConfig():  # the shipped model has tokens for digits only
                return record_problems(config)
            problems = find_problems(config)
            if not problems:
                try_start(config)
            return problems
    except (ConfigError, InputError, EngineError, StorageError) as error:
        return [str(error)]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the results; returns 0, 1 if something needed does not work, or 2 for bad input."""
    protect_output()
    quiet_transformers()
    limit_threads()
    arguments = sys.argv[1:] if argv is None else argv
    try:
        args = read_command_line(DoctorArgs, arguments, command="doctor", prog="python -m mgrpo.doctor").require()
        device = pick_device(args.device)
    except ConfigError as error:
        print(str(error).replace("config: --model.device", "doctor: --device"), file=sys.stderr)
        return 2
    console = make_console()
    given = (args.model, args.data) != (ModelConfig(), DataConfig())
    problems = check_given(args.model, args.data) if given else []
    console.print(_table("Machine", ("what", "found"), list(describe_machine(device).items())))
    extras = {name: "present" if importlib.util.find_spec(name) else remedy for name, remedy in EXTRAS.items()}
    console.print(_table("Extras", ("package", "present, or how to get it"), list(extras.items())))
    needed = check_needed()
    rows = [(check.name, "works" if check.works else "FAILS", check.detail) for check in needed]
    console.print(_table("Needed", ("what", "state", "detail"), rows))
    known = K.backends()
    rows = [(name, "available" if state.available else "unavailable", state.reason) for name, state in known.items()]
    console.print(_table("Kernel backends", ("backend", "state", "reason"), rows))
    gb_per_s = measure_roof(device)
    ops = make_ops(device)
    taken = {name: resolve(name, device, "auto", op.dtypes) for name, op in ops.items()}
    results = [
        check_kernel(name, op, backend, gb_per_s)
        for name, op in ops.items()
        for backend in known
        if runs_on(name, op, backend, device)
    ]
    caption = (
        "error: against the reference in fp64, relative to the largest value (at least 1). time: forward, median of 5."
        "\nroof: bytes of inputs and outputs, each moved once, per second, as a share of the fastest copy or in-place "
        f"sum now: {gb_per_s:.1f} GB/s. Empty for compute-bound ops. auto: the backend that auto picks here."
    )
    columns = ("op", "backend", "auto", "error", "time, ms", "of the roof", "state")
    rows = [_kernel_row(result, taken[result.op]) for result in results]
    console.print(_table(f"Kernels on {device}", columns, rows, caption))
    healthy = all(check.works for check in needed) and not any(result.problem for result in results)
    console.print("Everything that training needs works." if healthy else "Something that training needs fails.")
    if given and not problems:
        console.print("A run with this model and these prompts can start.")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 2 if problems else 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
