from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mgrpo_kernels
from mgrpo_kernels import backends, group_advantage
from mgrpo_kernels.backends import Availability, resolve
from mgrpo_kernels.operations import OPERATIONS

PACKAGE = Path(mgrpo_kernels.__file__).parent
CPU = torch.device("cpu")
LOSS = (
    "old_logprob=None, ref_logprob=None, rollout_logprob=None, {entropy}cu_seqlens=None, clip_low=0.2, clip_high=0.2, "
    "dual_clip=None, kl_coef=0.0, kl='k3', entropy_coef=0.0, tis_cap=2.0, ratio='token', reduce='token_mean', "
    "max_length=None, normalizer=None, backend='auto'"
)
SIGNATURES = {
    "token_logprob": "logits, targets, *, temperature=1.0, mask=None, softcap=None, self_certainty=False, "
    "inplace_backward=False, backend='auto'",
    "linear_token_logprob": "hidden, weight, targets, *, bias=None, temperature=1.0, mask=None, softcap=None, "
    "self_certainty=False, budget_bytes=None, group=None, backend='auto'",
    "trajectory_entropy": "token_entropy, *, cu_seqlens=None, mask=None, reduce='mean', backend='auto'",
    "ema_update_": "momentum, policy, decay, *, rounding='nearest', compensation=None, publish=None, seed=0, step=0, "
    "offsets=None, backend='auto'",
    "group_advantage": "rewards, *, keep=None, mode='std', backend='auto'",
    "majority_vote": "answer_ids, *, keep=None, weights=None, tie_break=None, backend='auto'",
    "iqr_filter": "entropy, *, k=0.75, scope='batch', keep=None, two_sided=False, backend='auto'",
    "grpo_loss": "logprob, advantage, mask, *, " + LOSS.format(entropy="entropy=None, "),
    "logits_grpo_loss": "logits, targets, advantage, mask, *, temperature=1.0, " + LOSS.format(entropy=""),
    "linear_grpo_loss": "hidden, weight, targets, advantage, mask, *, temperature=1.0, budget_bytes=None, group=None, "
    + LOSS.format(entropy=""),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(mgrpo_kernels, name)).parameters.values()
    bare = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
    assert str(inspect.Signature(bare)) == f"({SIGNATURES[name]})"


def test_root_exports_the_operations_their_results_and_backends():
    results = {"TokenLogprob", "MajorityVote", "IqrFilter", "GrpoLoss"}
    assert SIGNATURES.keys() == OPERATIONS.keys()
    assert set(mgrpo_kernels.__all__) == set(OPERATIONS) | results | {"backends"}


def test_reference_is_available_everywhere(monkeypatch):
    monkeypatch.delenv("MGRPO_BACKEND", raising=False)
    assert backends()["reference"].available
    for device in ("cuda", "meta"):
        assert resolve("op", torch.device(device), "auto") == "reference"


def test_the_compiled_library_is_here_and_comes_first_on_a_cpu(monkeypatch):
    monkeypatch.delenv("MGRPO_BACKEND", raising=False)
    assert backends()["cpu"].available, backends()["cpu"].reason
    assert resolve("op", CPU, "auto", (torch.float32, torch.bfloat16)) == "cpu"
    assert resolve("op", CPU, "auto", (torch.float32, torch.float64)) == "reference"
    assert resolve("op", torch.device("meta"), "cpu", (torch.float32,)) == "cpu"


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cuda", torch.float32, "op: backend must be a backend for cuda tensors, got 'cpu'. Move the tensors"),
        ("cpu", torch.float64, "op: backend must be a backend for float64, got 'cpu'. Convert the tensors"),
    ],
)
def test_a_named_backend_never_falls_back(device, dtype, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        resolve("op", torch.device(device), "cpu", (dtype,))


def test_unknown_backend_lists_what_is_available():
    message = r"^op: backend must be one of \['auto', 'reference'.*\], got 'turbo'\. (.*; )?'turbo' is not a backend of"
    with pytest.raises(ValueError, match=message):
        resolve("op", CPU, "turbo")


def test_unavailable_backend_says_why(monkeypatch):
    module = sys.modules["mgrpo_kernels.backends"]
    monkeypatch.setitem(module._KNOWN, "fast", Availability(False, "needs a card"))
    with pytest.raises(ValueError, match=r"got 'fast'\. (.*; )?fast is unavailable: needs a card\.$"):
        resolve("op", CPU, "fast", (), ("fast", "reference"))
    with pytest.raises(ValueError, match=r"^op: backend must be one of \['auto', 'reference'\], got 'cpu'\. .* has no"):
        resolve("op", CPU, "cpu", (), ("reference",))
    monkeypatch.setattr(module, "_ORDER", {"cpu": ("fast", "reference")})
    assert resolve("op", CPU, "auto", (), ("fast", "reference")) == "reference"


def test_environment_replaces_auto_alone(monkeypatch):
    monkeypatch.setenv("MGRPO_BACKEND", "turbo")
    with pytest.raises(ValueError, match=r"^group_advantage: MGRPO_BACKEND must be one of .* got 'turbo'"):
        group_advantage(torch.rand(2, 3))
    group_advantage(torch.rand(2, 3), backend="reference")


def test_values_are_read_off_the_cpu_only_on_request(monkeypatch):
    checks = sys.modules["mgrpo_kernels._common.checks"].checks_values
    monkeypatch.delenv("MGRPO_CHECK", raising=False)
    assert checks(CPU) and not checks(torch.device("cuda"))
    monkeypatch.setenv("MGRPO_CHECK", "1")
    assert checks(torch.device("cuda"))


def test_imports_neither_the_trainer_nor_its_libraries():
    script = (
        "import sys, mgrpo_kernels, mgrpo_kernels.testing; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", script]
    loaded = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert "mgrpo_kernels" in loaded
    assert not {"mgrpo", "transformers", "vllm"} & set(loaded)


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/*.py")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_only_the_root_imports_an_api(path):
    names = imported_modules(path)
    assert not any(name.endswith(".api") for name in names)
    assert path.name == "api.py" or "mgrpo_kernels.backends" not in names
