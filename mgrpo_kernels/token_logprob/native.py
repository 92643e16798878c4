"""Launches of the compiled kernels: tensors to addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels._common.native import address, as_fp32, code, contiguous, native
from mgrpo_kernels._common.structs import RowBackward, RowInputs


class Rows:
    """A LogitRows of the library, with the tensors that must outlive it."""

    def __init__(self, rows: RowInputs):
        logits = rows.logits
        self._kept = (logits, rows.targets.contiguous(), contiguous(rows.mask), as_fp32(rows.temperatures))
        addresses = [address(tensor) for tensor in self._kept]
        self.library, self.executor = native(logits)
        self.pointers: Any = self.library.LogitRows(
            addresses[0],
            code(logits.dtype),
            *logits.shape,
            logits.stride(0),
            *addresses[1:],
            rows.temperature,
            rows.softcap,
        )


def token_logprob_fwd(rows: RowInputs, self_certainty: bool) -> tuple[Tensor, ...]:
    """See ops.py."""
    launch, num_rows = Rows(rows), rows.logits.shape[0]
    sizes = (num_rows,) * 3 + (num_rows if self_certainty else 0,) * 2
    outputs = tuple(rows.logits.new_empty(size, dtype=torch.float32) for size in sizes)
    used = [address(output) for output in outputs[:3]] + [address(output) * self_certainty for output in outputs[3:]]
    launch.library.token_logprob_fwd(launch.pointers, *used, launch.executor)
    return outputs


def _backward(dlogits: Tensor, rows: RowInputs, given: RowBackward) -> None:
    """Write the gradient of `rows` into dlogits."""
    launch = Rows(rows)
    kept = [as_fp32(tensor) for tensor in given]
    addresses = [address(tensor) for tensor in kept]
    stride = dlogits.stride(0)
    launch.library.token_logprob_bwd(launch.pointers, *addresses, address(dlogits), stride, launch.executor)


def token_logprob_bwd(rows: RowInputs, given: RowBackward) -> Tensor:
    """See ops.py."""
    dlogits = rows.logits.new_empty(rows.logits.shape)
    _backward(dlogits, rows, given)
    return dlogits


def token_logprob_bwd_(rows: RowInputs, given: RowBackward) -> None:
    """See ops.py."""
    _backward(rows.logits, rows, given)
