"""Exponential moving average of weights: 64 Mi elements in 64 tensors, on a GPU 4 G in 96 where they fit."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench.harness.case import Candidate, Case, NotInstalledError, Outputs, Run, load
from mgrpo_kernels import ema_update_

OP = "ema_update_"
# tensors, elements of each
SHAPES = {"cpu": (64, 2**20), "cuda": (96, 40 * 2**20), "tiny": (4, 2**16)}
# A third of the free memory holds momentum, policy and the engine's copy; the candidates need the rest.
MEMORY_SHARE = 3
# Tensors compared on a GPU, of 4 G elements.
COMPARED = 8
SMALL = (3, 1_027)
# Far from 1, so that the change is large enough to compare results; no candidate's time depends on it.
DECAY = 0.9


@dataclass(frozen=True)
class Mode:
    """Dtypes of one way to update."""

    policy: torch.dtype
    momentum: torch.dtype
    rounding: str = "nearest"
    publish: torch.dtype | None = None

    @property
    def bytes_per_element(self) -> int:
        """One read of both, one write of momentum and publish."""
        published = self.publish.itemsize if self.publish is not None else 0
        return self.policy.itemsize + 2 * self.momentum.itemsize + published


@dataclass(frozen=True)
class Inputs:
    """Inputs of each candidate; on a CPU each has its own momentum, on a GPU they share one."""

    momentum: list[Tensor]
    policy: list[Tensor]
    mode: Mode
    shared: list[Tensor] | None = None
    shared_publish: list[Tensor] | None = None

    def start(self) -> list[Tensor]:
        """A fresh momentum."""
        if self.shared is None:
            return [tensor.clone() for tensor in self.momentum]
        for own, tensor in zip(self.shared, self.momentum, strict=True):
            own.copy_(tensor)
        return self.shared

    def publish(self) -> list[Tensor] | None:
        """Storage of the rollout engine."""
        dtype = self.mode.publish
        if self.shared_publish is None:
            return None if dtype is None else [torch.ones_like(tensor, dtype=dtype) for tensor in self.momentum]
        for tensor in self.shared_publish:
            tensor.fill_(1)
        return self.shared_publish

    def named(self, momentum: Sequence[Tensor], publish: Sequence[Tensor] | None) -> Outputs:
        """Results to compare: all, or with shared storage a copy of a few tensors."""
        step = 1 if self.shared is None else max(len(momentum) // COMPARED, 1)
        named = {"momentum": torch.cat([tensor.detach() for tensor in momentum[::step]])}
        return named if publish is None else {**named, "publish": torch.cat(list(publish[::step]))}


def make(num: int, size: int, mode: Mode) -> Inputs:
    """Independent normal weights."""
    torch.manual_seed(0)
    momentum = [torch.randn(size).to(mode.momentum) for _ in range(num)]
    inputs = Inputs(momentum, [torch.randn(size).to(mode.policy) for _ in range(num)], mode)
    return replace(inputs, shared=inputs.start(), shared_publish=inputs.publish()) if momentum[0].is_cuda else inputs


def num_tensors(scale: str, mode: Mode, free_bytes: int) -> int:
    """Number of tensors: all of the shape, on a GPU only those that fit."""
    num, size = SHAPES[scale]
    if scale != "cuda":
        return num
    published = mode.publish.itemsize if mode.publish is not None else 0
    return min(
        num, max(1, free_bytes // MEMORY_SHARE // (size * (mode.policy.itemsize + mode.momentum.itemsize + published)))
    )


def run(inputs: Inputs, update: Callable[[], Any], momentum: Sequence[Tensor]) -> Run:
    """The update, then the copy for the rollout engine if the mode has one."""
    publish = inputs.publish()

    def with_publish() -> None:
        update()
        if publish is not None:
            with torch.no_grad():
                torch._foreach_copy_(list(publish), list(momentum))  # pyright: ignore[reportPrivateImportUsage]

    return Run(call=with_publish, outputs=lambda _: inputs.named(momentum, publish))


def ours(backend: str) -> Candidate:
    def prepare(inputs: Inputs) -> Run:
        momentum, publish = inputs.start(), inputs.publish()

        def update() -> None:
            ema_update_(
                momentum, inputs.policy, DECAY, rounding=inputs.mode.rounding, publish=publish, seed=1, backend=backend
            )

        return Run(call=update, outputs=lambda _: inputs.named(momentum, publish))

    return Candidate(name=f"ours, {backend}", prepare=prepare)


def oracle(inputs: Inputs) -> Outputs:
    """In fp64, unrounded."""
    momentum = [tensor.double() for tensor in inputs.momentum]
    ema_update_(momentum, [tensor.double() for tensor in inputs.policy], DECAY, backend="reference")
    return inputs.named(momentum, None if inputs.mode.publish is None else momentum)


def foreach(inputs: Inputs) -> Run:
    momentum = inputs.start()

    def update() -> None:
        policy = inputs.policy
        if inputs.mode.policy != inputs.mode.momentum:
            policy = [tensor.to(inputs.mode.momentum) for tensor in policy]
        torch._foreach_lerp_(momentum, policy, 1 - DECAY)  # pyright: ignore[reportPrivateImportUsage]

    return run(inputs, update, momentum)


def mul_add(inputs: Inputs) -> Run:
    momentum = inputs.start()

    def update() -> None:
        for old, new in zip(momentum, inputs.policy, strict=True):
            old.mul_(DECAY).add_(new, alpha=1 - DECAY)

    return run(inputs, update, momentum)


def module(tensors: Sequence[Tensor]) -> nn.Module:
    """Parameters that share the tensors' storage."""
    return nn.ParameterList([nn.Parameter(tensor) for tensor in tensors])


def averaged_model(inputs: Inputs) -> Run:
    policy = module(inputs.policy)
    model = AveragedModel(module(inputs.start()), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    model.n_averaged.fill_(1)
    return run(inputs, lambda: model.update_parameters(policy), list(model.module.parameters()))


def diffusers(foreach: bool) -> Callable[[Inputs], Run]:
    def prepare(inputs: Inputs) -> Run:
        policy = list(module(inputs.policy).parameters())
        ema = load("diffusers.training_utils", "EMAModel")(
            list(module(inputs.momentum).parameters()), decay=DECAY, min_decay=DECAY, foreach=foreach
        )
        ema.optimization_step = 1
        return run(inputs, lambda: ema.step(policy), ema.shadow_params)

    return prepare


def ema_pytorch(inputs: Inputs) -> Run:
    ema = load("ema_pytorch", "EMA")(
        module(inputs.policy),
        ema_model=module(inputs.start()),
        beta=DECAY,
        min_value=DECAY,
        update_after_step=0,
        update_every=1,
        include_online_model=False,
        use_foreach=True,
        coerce_dtype=True,
    )
    ema.initted.fill_(True)
    ema.step.fill_(10)
    return run(inputs, ema.update, list(ema.ema_model.parameters()))


def timm(inputs: Inputs) -> Run:
    """timm's package needs torchvision, this file of it only torch."""
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        raise NotInstalledError("timm")
    path = Path(found.submodule_search_locations[0]) / "utils" / "model_ema.py"
    spec = spec_from_file_location("timm_model_ema", path)
    assert spec is not None and spec.loader is not None
    loaded = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    policy = module(inputs.policy)
    ema = loaded.ModelEmaV3(module(inputs.start()), decay=DECAY, stochastic_rounding=inputs.mode.rounding != "nearest")
    return run(inputs, lambda: ema.update(policy), list(ema.module.parameters()))


PACKAGES = [
    Candidate(name="torch AveragedModel, get_ema_multi_avg_fn", prepare=averaged_model),
    Candidate(name="timm ModelEmaV3", package="timm", prepare=timm),
    Candidate(name="diffusers EMAModel(foreach=True)", package="diffusers", prepare=diffusers(True)),
    Candidate(name="diffusers EMAModel(foreach=False)", package="diffusers", prepare=diffusers(False)),
    Candidate(name="ema-pytorch EMA(use_foreach=True)", package="ema-pytorch", prepare=ema_pytorch),
]
LERP = Candidate(name="torch._foreach_lerp_", prepare=foreach)
CAST = Candidate(name="torch cast, _foreach_lerp_", prepare=foreach)
NEAREST = Candidate(name="torch._foreach_lerp_, to nearest (stalls at decay 0.999)", prepare=foreach)
MUL_ADD = Candidate(name="torch mul_, add_", prepare=mul_add)

FP32, BF16 = torch.float32, torch.bfloat16
MODES = {
    "bf16_to_fp32": (Mode(BF16, FP32), [CAST, MUL_ADD, *PACKAGES]),
    "bf16_to_fp32_publish_bf16": (Mode(BF16, FP32, publish=BF16), [CAST, MUL_ADD, *PACKAGES[:2]]),
    "fp32_to_fp32": (Mode(FP32, FP32), [LERP, MUL_ADD, *PACKAGES]),
    "fp32_to_fp32_publish_bf16": (Mode(FP32, FP32, publish=BF16), [LERP, MUL_ADD, *PACKAGES[:2]]),
    "bf16_to_bf16_stochastic": (Mode(BF16, BF16, rounding="stochastic"), [PACKAGES[1], NEAREST]),
}


@pytest.mark.parametrize("mode", MODES)
def test_ema_update(bench, scale, mode, backend):
    """Policy to momentum; "publish" also writes the rollout engine's copy."""
    chosen, peers = MODES[mode]
    size = SHAPES[scale][1]
    num = num_tensors(scale, chosen, torch.cuda.mem_get_info()[0] if scale == "cuda" else 0)
    bench(
        Case(
            op=OP,
            mode=mode.replace("_", " "),
            dtype=str(chosen.momentum).removeprefix("torch."),
            shape=f"{num} x {size / 2**20:g} Mi elements",
            make=lambda: make(num, size, chosen),
            make_small=lambda: make(*SMALL, chosen),
            ours=ours,
            oracle=oracle,
            peers=peers,
            reduction_length=1,
            bytes_moved=num * size * chosen.bytes_per_element,
            cold=True,
        ),
        backend,
    )
