"""The CUDA kernels as nvcc compiles them; what they compute is the business of `make emulate` and of a GPU."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import mgrpo_kernels
from mgrpo_kernels import backends
from mgrpo_kernels.testing import (
    assert_gradient_within_budget,
    assert_within_budget,
    exponent_length,
    peaked_logits,
)

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# Kernels that read or write large tensors, and how they must do it: 16 bytes at a time.
WAYS = {
    "load": r"\bld\.global\.[\w.]*v4\.",
    "store": r"\bst\.global\.[\w.]*v4\.",
    "copy": r"\bcp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16;",
}
MEMORY_BOUND = {
    "token_logprob_fwd_kernel": ("copy",),
    "token_logprob_bwd_kernel": ("copy", "store"),
    "ema_update_kernel": ("load", "store"),
    "logits_grpo_loss_fwd_kernel": ("copy", "store"),
}
# Kernels of clusters: nothing where there are none.
CLUSTERED = {"logits_grpo_loss_fwd_kernel"}
# What the arguments of a kernel may take, and an entry of the list of weights.
MOST_ARGUMENT_BYTES, ENTRY_BYTES = 32764, 40
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.fixture(scope="module", params=["sm_80", "sm_90a"])
def compiled(request, tmp_path_factory):
    """The architecture; PTX of every source, and what the assembler says of it."""
    architecture, folder = request.param, tmp_path_factory.mktemp(request.param)
    found = {}
    for source in SOURCES:
        target = folder / f"{source.stem}.ptx"
        command = ["nvcc", "-std=c++17", "-O3", "-ptx", f"-arch={architecture}"]
        command += [f"-I{ROOT / 'csrc' / 'common'}", f"-I{ROOT / 'csrc' / 'cuda'}", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
        assemble = ["nvcc", "-cubin", "-Xptxas", "-v", f"-arch={architecture}", str(target), "-o", "/dev/null"]
        done = subprocess.run(assemble, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[source.stem] = (done.stderr, target.read_text())
    return architecture, found


def kernels_of(code: str) -> dict[str, str]:
    """PTX of each kernel, by its mangled name."""
    parts = re.split(r"^\.visible \.entry (\w+)\(|^\.entry (\w+)\(", code, flags=re.MULTILINE)
    names = [one or other for one, other in zip(parts[1::3], parts[2::3], strict=True)]
    return dict(zip(names, parts[3::3], strict=True))


@needs_nvcc
def test_no_kernel_spills_or_uses_a_stack(compiled):
    for name, (report, _) in compiled[1].items():
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert frames, f"{name}: ptxas reports no kernel"
        assert set(frames) == {("0", "0", "0")}, f"{name}: {frames}"


@needs_nvcc
def test_large_tensors_move_16_bytes_at_a_time(compiled):
    architecture, sources = compiled
    seen = set()
    for _, code in sources.values():
        for symbol, body in kernels_of(code).items():
            for kernel, ways in MEMORY_BOUND.items():
                if kernel not in symbol:
                    continue
                seen.add(kernel)
                is_empty = kernel in CLUSTERED and architecture == "sm_80"
                for way in ways:
                    assert (re.search(WAYS[way], body) is None) == is_empty, f"{symbol}: 16 bytes by {way}"
                assert ("barrier.cluster" in body) == (kernel in CLUSTERED and not is_empty), symbol
                assert not re.search(r"\b(atom|red)\.", body), f"{symbol}: an atomic"
    assert seen == set(MEMORY_BOUND)


@needs_nvcc
def test_one_launch_takes_the_weights_of_a_model_of_64_layers(compiled):
    _, code = compiled[1]["ema_update"]
    sizes = [int(size) for size in re.findall(r"\.param [^\n]*ema_update_kernel\w*_param_0\[(\d+)\]", code)]
    assert 64 * 11 * ENTRY_BYTES < max(sizes) <= MOST_ARGUMENT_BYTES
    assert min(sizes) <= 4096


@needs_nvcc
def test_the_library_loads_without_a_driver_and_says_what_it_is_for():
    from mgrpo_kernels import _C_cuda  # pyright: ignore[reportAttributeAccessIssue]

    assert _C_cuda.architectures() == "80,90a-real"
    state = backends()["cuda"]
    assert state.available is (_C_cuda.error() == "")
    assert state.available or state.reason == "no CUDA device is available"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "padding"), [(20000, 0), (33000, 8), (33001, 7)])
def test_rows_that_threads_take_in_several_batches(dtype, vocabulary, padding):
    """On a GPU the cuda backend; elsewhere cpu, which `make emulate` makes of the CUDA sources."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = 7
    storage = torch.full((tokens * (vocabulary + padding),), torch.nan, dtype=dtype)
    logits = storage.as_strided((tokens, vocabulary), (vocabulary + padding, 1))
    logits.copy_(peaked_logits(tokens, vocabulary, dtype=dtype, seed=1))
    logits[2, 100 : vocabulary // 2] = -torch.inf
    targets = torch.tensor([0, vocabulary - 1, 5, 4096, 8191, 7, 12345])
    mask = torch.arange(tokens) != 5
    logits[5] = torch.nan
    shared: dict[str, Any] = {"mask": mask, "temperature": torch.linspace(0.7, 1.4, tokens)}
    near = mgrpo_kernels.token_logprob(logits.double(), targets, **shared, backend="reference").logprob.float()
    options = shared | {
        "advantage": torch.linspace(-1.0, 1.3, tokens),
        "cu_seqlens": torch.tensor([0, 2, tokens]),
        "old_logprob": near + torch.linspace(-0.2, 0.2, tokens),
        "reduce": "sequence_mean_token_mean",
        "entropy_coef": 0.05,
    }
    results = []
    runs = [("reference", torch.float64, "cpu"), ("reference", torch.float32, "cpu"), (device, dtype, device)]
    for name, to, where in runs:
        # A dtype of its own keeps the strides.
        leaf = (logits if name == device else logits.to(to)).to(where).detach().requires_grad_()
        moved: dict[str, Any] = {
            key: value.to(where) if isinstance(value, torch.Tensor) else value for key, value in options.items()
        }
        out = mgrpo_kernels.logits_grpo_loss(leaf, targets.to(where), **moved, backend=name)
        out.loss.backward()
        assert leaf.grad is not None
        results.append((out.loss.detach().cpu(), leaf.grad.cpu()))
    oracle, rounded, actual = results
    length = vocabulary + 2 * exponent_length(logits[mask], 0.7)
    # Of the tokens' terms, which are of both signs: a ratio of at most e^0.2 times an advantage.
    largest_term = 1.3 * math.exp(0.2)
    assert_within_budget(
        actual[0], oracle[0], rounded[0], reduction_length=length, largest_term=largest_term, what="loss"
    )
    gradients = (actual[1], oracle[1], rounded[1].to(dtype))
    assert_gradient_within_budget(*gradients, targets, reduction_length=length)
