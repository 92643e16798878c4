"""Code shared by the Triton modules of all operations."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


def interprets() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Variant(NamedTuple):
    """A kernel as a launcher starts it, for ahead-of-time compilation; a module lists its own in `variants()`."""

    kernel: Any
    signature: Mapping[str, str]  # of every argument in order: "*bf16", "i64", "fp32", "constexpr"
    constants: Mapping[str, Any]
    num_warps: int
    aligned: tuple[str, ...]  # arguments that are multiples of 16, as Triton finds of a launch's
    reads: int  # bytes that a thread asks for at once, 16 in each load; 0 where the time is not that of the bytes
    writes: int  # bytes of a block that a thread writes, 16 in each store
    options: Mapping[str, Any]  # others of the launch, such as num_stages


def variant(
    kernel: Any,
    types: Mapping[str, str | None],
    constants: Mapping[str, Any],
    num_warps: int,
    *,
    aligned: tuple[str, ...] = (),
    reads: int = 0,
    writes: int = 0,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Variant:
    """A variant; `types` are those of the non-constant arguments, None for an absent one. Pointers are aligned."""
    given = {name: types[name] for name in kernel.arg_names if name not in constants}
    absent = {name: None for name, kind in given.items() if kind is None}
    pointers = tuple(name for name, kind in given.items() if kind and kind[0] == "*")
    signature = {name: given.get(name) or "constexpr" for name in kernel.arg_names}
    return Variant(kernel, signature, absent | dict(constants), num_warps, pointers + aligned, reads, writes, options)
