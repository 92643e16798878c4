"""Leaves masked rows out of every product, for all backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mgrpo_kernels._rows import active_rows
from mgrpo_kernels.results import TokenLogprob

Node = Callable[[Tensor, Tensor, float | Tensor], tuple[Tensor, ...]]


def on_active_rows(
    node: Node,
    hidden: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    self_certainty: bool,
) -> TokenLogprob:
    """Results of `node(hidden, targets, temperature)` on the active rows, 0 on the others."""
    active = active_rows(targets, mask)
    num_rows = hidden.shape[0]
    if torch.compiler.is_compiling() or hidden.device.type != "cpu":
        # The number of active rows is unknown without values, for which a GPU would have to be waited for: keep them
        # all, and let no value of a masked one through.
        hidden = hidden.masked_fill(~active[:, None], 0)
        targets = targets.masked_fill(~active, 0)
        if isinstance(temperature, Tensor):
            temperature = temperature.masked_fill(~active, 1)
        outputs = [output.masked_fill(~active, 0) for output in node(hidden, targets, temperature)]
    elif active.all():
        outputs = node(hidden, targets, temperature)
    else:
        rows = active.nonzero().squeeze(1)
        temperature = temperature[rows] if isinstance(temperature, Tensor) else temperature
        outputs = node(hidden.index_select(0, rows), targets[rows], temperature)
        outputs = [output.new_zeros(num_rows).index_copy(0, rows, output) for output in outputs]
    logprob, entropy, lse, certainty = outputs
    return TokenLogprob(logprob, entropy, lse, certainty if self_certainty else None)
