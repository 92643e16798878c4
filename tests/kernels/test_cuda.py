"""The CUDA kernels as nvcc compiles them; what they compute is the business of `make emulate` and of a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mgrpo_kernels import backends

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# Kernels that read or write large tensors, and must do it 16 bytes at a time.
MEMORY_BOUND = {
    "token_logprob_fwd_kernel": ("ld",),
    "token_logprob_bwd_kernel": ("ld", "st"),
    "ema_update_kernel": ("ld", "st"),
}
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.fixture(scope="module", params=["sm_80", "sm_90a"])
def compiled(request, tmp_path_factory):
    """PTX of every source, and what the assembler says of it."""
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
    return found


def kernels_of(code: str) -> dict[str, str]:
    """PTX of each kernel, by its mangled name."""
    parts = re.split(r"^\.visible \.entry (\w+)\(|^\.entry (\w+)\(", code, flags=re.MULTILINE)
    names = [one or other for one, other in zip(parts[1::3], parts[2::3], strict=True)]
    return dict(zip(names, parts[3::3], strict=True))


@needs_nvcc
def test_no_kernel_spills_or_uses_a_stack(compiled):
    for name, (report, _) in compiled.items():
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert frames, f"{name}: ptxas reports no kernel"
        assert set(frames) == {("0", "0", "0")}, f"{name}: {frames}"


@needs_nvcc
def test_large_tensors_move_16_bytes_at_a_time(compiled):
    seen = set()
    for _, code in compiled.values():
        for symbol, body in kernels_of(code).items():
            for kernel, instructions in MEMORY_BOUND.items():
                if kernel not in symbol:
                    continue
                seen.add(kernel)
                for instruction in instructions:
                    assert re.search(rf"\b{instruction}\.global\.[\w.]*v4\.", body), (
                        f"{symbol}: no 16-byte {instruction}"
                    )
                assert not re.search(r"\b(atom|red)\.", body), f"{symbol}: an atomic"
    assert seen == set(MEMORY_BOUND)


@needs_nvcc
def test_the_library_loads_without_a_driver_and_says_what_it_is_for():
    from mgrpo_kernels import _C_cuda  # pyright: ignore[reportAttributeAccessIssue]

    assert _C_cuda.architectures() == "80,90a-real"
    state = backends()["cuda"]
    assert state.available is (_C_cuda.error() == "")
    assert state.available or state.reason == "no CUDA device is available"
