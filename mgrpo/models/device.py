"""Choice of the device and of the kernels' backend."""

from __future__ import annotations

import re

import torch

from mgrpo.errors import ConfigError
from mgrpo_kernels.backends import resolve

ON_GPU = ("triton", "cuda")  # backends
DEVICE = re.compile(r"cpu|cuda(?::(0|[1-9]\d{0,5}))?")


def pick_device(device: str, *, planned: bool = False) -> torch.device:
    """Resolves `auto` to a GPU where there is one; of a plan for a GPU, which need not be here, to a GPU."""
    if device == "auto":
        return torch.device("cuda" if planned or torch.cuda.is_available() else "cpu")
    # torch accepts names of devices that this build or the kernels do not support: mps, xpu, xla, meta.
    match = DEVICE.fullmatch(device)
    if match is None:
        raise ConfigError([f"config: --model.device must be auto, cpu or cuda[:N], got {device}."])
    if planned:
        return torch.device(device)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError([f"config: --model.device must be available, got {device} where torch sees no GPU."])
    if int(match[1] or 0) >= max(torch.cuda.device_count(), 1):
        raise ConfigError(
            [f"config: --model.device must be one of {torch.cuda.device_count()} GPUs, from cuda:0 on, got {device}."]
        )
    return torch.device(device)


def pick_backend(
    backend: str, device: torch.device, op: str = "token_logprob", dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> str:
    """Resolves --kernels.backend for an operation on a device, with MGRPO_BACKEND in place of `auto`."""
    if device.type == "cuda" and backend in ON_GPU and not torch.cuda.is_available():  # of a plan
        return backend
    try:
        return resolve(op, device, backend, dtypes)
    except ValueError as error:
        problem = str(error).replace(f"{op}: ", "config: ", 1).replace("backend must", "--kernels.backend must", 1)
        raise ConfigError([problem]) from error
