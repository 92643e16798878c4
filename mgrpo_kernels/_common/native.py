"""The compiled libraries, and conversion of tensors to their arguments: addresses, dtype codes, executors."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class Native(NamedTuple):
    """A library and the executor of its launchers: a number of threads on a CPU, a stream on a GPU."""

    library: ModuleType
    executor: int


def _load(name: str, needs: str) -> tuple[ModuleType | None, str]:
    """A library of the package, or None and the reason."""
    try:
        return import_module(f"mgrpo_kernels.{name}"), "compiled"
    except ModuleNotFoundError:
        return None, f"the compiled library is missing: install the package with {needs}"
    except ImportError as error:
        return None, f"the compiled library does not load: {error}"


_LIBRARIES = {"cpu": _load("_C", "a C++ compiler"), "cuda": _load("_C_cuda", "nvcc")}
_library = _LIBRARIES["cpu"][0]
CPU = (True, f"compiled, instruction set {_library.isa()}") if _library else (False, _LIBRARIES["cpu"][1])
CUDA = (_LIBRARIES["cuda"][0] is not None, _LIBRARIES["cuda"][1])


def sources() -> dict[str, str]:
    """Hashes of the compiled CUDA sources by file name; empty without the library."""
    library = _LIBRARIES["cuda"][0]
    return {} if library is None else library.sources()


_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = tuple(_CODES)


def native(like: Tensor) -> Native:
    """The library for a tensor's device; RuntimeError if it is missing, in a call that bypassed `resolve`."""
    device = like.device.type
    library, reason = _LIBRARIES[device]
    if library is None:
        raise RuntimeError(f"mgrpo_kernels: the backend for {device} tensors is unavailable: {reason}")
    return Native(library, torch.get_num_threads() if device == "cpu" else torch.cuda.current_stream().cuda_stream)


def address(tensor: Tensor | None) -> int:
    """Address of the first element, 0 for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def code(dtype: torch.dtype) -> int:
    """Code of a dtype in the compiled library."""
    return _CODES[dtype]


def as_fp32(tensor: Tensor | None) -> Tensor | None:
    """Contiguous fp32 copy, for small tensors of one number a row."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, in its own dtype."""
    return None if tensor is None else tensor.contiguous()
