"""Triton's interpreter, made to round as a GPU does, so that the kernels' own stores of bf16 are tested."""

from __future__ import annotations

from typing import Any

from mgrpo_kernels._common.triton import interprets


def round_as_a_gpu() -> None:
    """Rounds fp32 to bf16 to nearest; by itself the interpreter truncates."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def rounding(self: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        bits = source.data.view(np.uint32)
        nearest = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
        bits = np.where(np.isnan(source.data), (bits >> 16) | 0x40, nearest)
        return interpreter.TensorHandle(bits.astype(np.uint16), tl.bfloat16)

    builder.cast_impl = rounding


if interprets():
    round_as_a_gpu()
