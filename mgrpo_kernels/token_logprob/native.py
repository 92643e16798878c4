"""Launches of the compiled kernels: tensors to addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels._common.native import address, as_fp32, code, contiguous, native


class Rows:
    """A LogitRows of the library, and the tensors that must outlive it."""

    def __init__(
        self,
        logits: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        temperature: float,
        temperatures: Tensor | None,
        softcap: float,
    ):
        self._kept = (logits, targets.contiguous(), contiguous(mask), as_fp32(temperatures))
        addresses = [address(tensor) for tensor in self._kept]
        self.library, self.executor = native(logits)
        self.pointers: Any = self.library.LogitRows(
            addresses[0],
            code(logits.dtype),
            logits.shape[0],
            logits.shape[1],
            logits.stride(0),
            *addresses[1:],
            temperature,
            softcap,
        )


def token_logprob_fwd(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    self_certainty: bool,
) -> tuple[Tensor, ...]:
    """See ops.py."""
    rows = Rows(logits, targets, mask, temperature, temperatures, softcap)
    extra = logits.shape[0] if self_certainty else 0
    sizes = (logits.shape[0],) * 3 + (extra,) * 2
    outputs = tuple(logits.new_empty(size, dtype=torch.float32) for size in sizes)
    used = [address(output) for output in outputs[:3]] + [address(output) * self_certainty for output in outputs[3:]]
    rows.library.token_logprob_fwd(rows.pointers, *used, rows.executor)
    return outputs


def _backward(dlogits: Tensor, rows: tuple[Any, ...], saved_and_grads: tuple[Tensor | None, ...]) -> None:
    """Write the gradient of `rows` into dlogits."""
    launch = Rows(*rows)
    kept = [as_fp32(tensor) for tensor in saved_and_grads]
    addresses = [address(tensor) for tensor in kept]
    stride = dlogits.stride(0)
    launch.library.token_logprob_bwd(launch.pointers, *addresses, address(dlogits), stride, launch.executor)


def token_logprob_bwd(*args: Any) -> Tensor:
    """See ops.py."""
    dlogits = args[0].new_empty(args[0].shape)
    _backward(dlogits, args[:6], args[6:])
    return dlogits


def token_logprob_bwd_(*args: Any) -> None:
    """See ops.py."""
    _backward(args[0], args[:6], args[6:])
