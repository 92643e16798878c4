"""A platform of verl's own registry for machines without a GPU: VERL_USE_EXTERNAL_MODULES=cpu_platform."""

from __future__ import annotations

import contextlib
import functools
import os
import types
from typing import Any

import torch
from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_base import PlatformBase
from verl.utils import distributed


class Device(types.ModuleType):
    """`torch.cpu` with what verl asks of `torch.cuda`."""

    def __getattr__(self, name: str) -> Any:
        if name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
            return lambda *_: 0
        if name == "mem_get_info":
            return lambda *_: (2**30, 2**30)
        if name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "manual_seed", "manual_seed_all"):
            return lambda *_: None
        if name in ("get_rng_state", "set_rng_state"):
            return getattr(torch, name)
        if name == "get_device_name":
            return lambda *_: "CPU"
        if name == "is_initialized":
            return lambda: False
        return getattr(torch.cpu, name)


class PlatformCPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "none"
    device_module = Device("cpu")

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> Any:
        return contextlib.nullcontext()

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"  # of which Ray is told that there is one

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")  # the FSDP engine is registered for it alone
platform_manager.PlatformRegistry.register("cpu")(PlatformCPU)
platform_manager._current_platform = PlatformCPU()
# verl names a backend for the CPU and one for the device, which are the same here.
distributed.initialize_global_process_group_ray = functools.partial(
    distributed.initialize_global_process_group_ray, backend="gloo"
)
