"""Options of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Tensor operations."""

    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Backend of mgrpo_kernels; "auto" is the first available for a device and dtype."""
