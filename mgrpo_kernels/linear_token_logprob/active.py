"""Excludes masked rows from all products, for all backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels._common.checks import check_tensor
from mgrpo_kernels._common.rows import active_rows
from mgrpo_kernels.results import TokenLogprob

Node = Callable[[Tensor, Tensor, float | Tensor], tuple[Tensor, ...]]


def _lies_on_host(mask: Any, hidden: Tensor) -> bool:
    return isinstance(mask, Tensor) and mask.device.type == "cpu" and hidden.device.type != "cpu"


def _to_device(tensor: Tensor, hidden: Tensor) -> Tensor:
    """Copies through pinned memory, because the copy may otherwise wait for the device."""
    return (tensor.pin_memory() if hidden.is_cuda else tensor).to(hidden.device, non_blocking=True)


def mask_on_device(where: str, mask: Any, hidden: Tensor) -> Any:
    """A copy on the device of a mask on the CPU, after a check of its shape; any other mask as it is."""
    if not _lies_on_host(mask, hidden):
        return mask
    check_tensor(where, "mask", mask, "[T]", (hidden.shape[0],), (torch.bool,))
    return _to_device(mask, hidden)


def _on_all(
    node: Node, active: Tensor, hidden: Tensor, targets: Tensor, temperature: float | Tensor
) -> tuple[Tensor, ...]:
    """Results of `node` on all rows, 0 on inactive ones, whose values are replaced before."""
    hidden = hidden.masked_fill(~active[:, None], 0)
    targets = targets.masked_fill(~active, 0)
    if isinstance(temperature, Tensor):
        temperature = temperature.masked_fill(~active, 1)
    return tuple(output.masked_fill(~active, 0) for output in node(hidden, targets, temperature))


def _on_rows(
    node: Node, rows: Tensor, hidden: Tensor, targets: Tensor, temperature: float | Tensor
) -> tuple[Tensor, ...]:
    """Results of `node` on the rows of the given indices, 0 on the others."""
    temperature = temperature[rows] if isinstance(temperature, Tensor) else temperature
    outputs = node(hidden.index_select(0, rows), targets[rows], temperature)
    return tuple(output.new_zeros(hidden.shape[0]).index_copy(0, rows, output) for output in outputs)


def on_active_rows(
    node: Node,
    hidden: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    self_certainty: bool,
) -> TokenLogprob:
    """Results of `node(hidden, targets, temperature)` on the active rows, 0 on the others."""
    inputs = (hidden, targets, temperature)
    # Counting active rows would wait for a GPU, and a compiler has no values: both keep all rows.
    if torch.compiler.is_compiling():
        outputs = _on_all(node, active_rows(targets, mask if mask is None else mask.to(hidden.device)), *inputs)
    elif mask is not None and _lies_on_host(mask, hidden):
        rows = _to_device(mask.nonzero().squeeze(1), hidden)
        outputs = _on_rows(lambda *some: _on_all(node, active_rows(some[1], None), *some), rows, *inputs)
    elif hidden.device.type != "cpu":
        outputs = _on_all(node, active_rows(targets, mask), *inputs)
    else:
        active = active_rows(targets, mask)
        outputs = node(*inputs) if active.all() else _on_rows(node, active.nonzero().squeeze(1), *inputs)
    logprob, entropy, lse, certainty = outputs
    return TokenLogprob(logprob, entropy, lse, certainty if self_certainty else None)
