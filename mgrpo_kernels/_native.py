"""The compiled library and what turns a tensor into what it takes: an address, a code, a number of threads."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

_library: ModuleType | None
try:
    _library = import_module("mgrpo_kernels._C")
    REASON = f"compiled, instruction set {_library.isa()}"
except ModuleNotFoundError:
    _library, REASON = None, "the compiled library is missing: install the package with a C++ compiler"
except ImportError as error:
    _library, REASON = None, f"the compiled library does not load: {error}"

AVAILABLE = _library is not None
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = tuple(_CODES)


def library() -> ModuleType:
    """The compiled library; `resolve` has refused the backend where there is none."""
    assert _library is not None
    return _library


def address(tensor: Tensor | None) -> int:
    """Address of the first element, 0 for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def code(dtype: torch.dtype) -> int:
    """Code of a dtype in the compiled library."""
    return _CODES[dtype]


def as_fp32(tensor: Tensor | None) -> Tensor | None:
    """Contiguous fp32, for the small tensors of one number a row."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, in its own dtype."""
    return None if tensor is None else tensor.contiguous()
