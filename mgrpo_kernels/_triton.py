"""What the Triton modules of all operations share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


def interprets() -> bool:
    """Whether Triton's kernels run in its interpreter, on tensors of a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Variant(NamedTuple):
    """A kernel as a launcher starts it, for the compiler ahead of time; a module lists its own in `variants()`."""

    kernel: Any
    signature: Mapping[str, str]  # of every argument in order: "*bf16", "i64", "fp32", "constexpr"
    constants: Mapping[str, Any]
    num_warps: int
    aligned: tuple[str, ...] = ()  # arguments that are multiples of 16, as Triton finds of a launch's
    memory_bound: bool = False  # the time is that of its bytes: it must load 16 bytes at a time
    options: Mapping[str, Any] = MappingProxyType({})  # others of the launch, such as num_stages
