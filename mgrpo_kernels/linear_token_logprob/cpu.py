"""Launches of the compiled CPU kernels: tensors to addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels._common.native import address, as_fp32, code, native
from mgrpo_kernels._common.rows import RowGrads
from mgrpo_kernels.linear_token_logprob.tiles import gradients_by_tiles, tile_columns

_BUDGET_BYTES = 64 * 2**20


class Head:
    """A LinearHead of the library, with the tensors that must outlive it."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        temperatures: Tensor | None,
        softcap: float,
        budget_bytes: int | None,
    ):
        if hidden.shape[1] > 1 and hidden.stride(1) != 1:
            hidden = hidden.contiguous()
        self._kept = (hidden, weight, as_fp32(bias), targets.contiguous(), as_fp32(temperatures))
        hidden_at, weight_at, bias_at, targets_at, temperatures_at = (address(tensor) for tensor in self._kept)
        self.library, executor = native(hidden)
        self.pointers: Any = self.library.LinearHead(
            hidden_at,
            weight_at,
            bias_at,
            code(hidden.dtype),
            hidden.shape[0],
            hidden.shape[1],
            weight.shape[0],
            hidden.stride(0),
            weight.stride(0),
            targets_at,
            temperatures_at,
            temperature,
            softcap,
            _BUDGET_BYTES if budget_bytes is None else budget_bytes,
            executor,
        )


def linear_token_logprob_fwd(*args: Any) -> tuple[Tensor | list[Tensor], ...]:
    """See ops.py."""
    head, self_certainty = Head(*args[:8]), args[8]
    outputs = tuple(torch.zeros(args[0].shape[0]) for _ in range(6))
    top, exp, exp_x, finite_x, num_finite, z_target = (address(output) for output in outputs)
    extra = (finite_x, num_finite) if self_certainty else (0, 0)
    head.library.linear_token_logprob_fwd(head.pointers, top, exp, exp_x, *extra, z_target)
    return *outputs, [], []


def linear_token_logprob_bwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.py."""
    # The portable forward may round every product: only the same products agree with its log-sum-exp.
    is_fused = args[0].dtype == torch.bfloat16 or native(args[0]).library.isa() == "portable"
    return _by_kernel(*args) if is_fused else _by_products(*args)


def _by_products(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    budget_bytes: int | None,
    _logprob: Tensor,
    lse: Tensor,
    constant: Tensor,
    onehot: Tensor | None,
    slope: Tensor | None,
    uniform: Tensor | None,
    _kept: list[Tensor],
    _anchors: list[Tensor],
    fp32_dhidden: bool,
    *needed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """In fp32 and fp16 torch's products of fp32 are faster than the kernel's, by more than the passes around them."""
    dhidden, dweight, dbias = gradients_by_tiles(
        hidden,
        weight,
        None if bias is None else bias.float(),
        columns,
        temperature=temperature if temperatures is None else temperatures.float(),
        softcap=softcap or None,
        lse=lse,
        coefficients=RowGrads(constant, onehot, slope, uniform),
        tile=tile_columns(hidden, weight.shape[0], budget_bytes),
        needed=(needed[0], needed[1], needed[2]),
    )
    nothing = torch.empty(0, 0)
    return (
        nothing if dhidden is None else dhidden if fp32_dhidden else dhidden.to(hidden.dtype),
        nothing.to(weight.dtype) if dweight is None else dweight,
        torch.empty(0) if dbias is None else dbias,
    )


def _by_kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """In bf16 the products are fused with what they multiply."""
    head, coefficients, (fp32_dhidden, *needed) = Head(*args[:8]), args[9:14], args[16:]
    hidden, weight, bias = args[:3]
    dhidden = torch.empty(hidden.shape if needed[0] else (0, 0), dtype=torch.float32 if fp32_dhidden else hidden.dtype)
    dweight = torch.empty(weight.shape if needed[1] else (0, 0), dtype=weight.dtype)
    dbias = torch.empty(bias.shape[0] if needed[2] else 0)
    if hidden.shape[0] == 0:
        return dhidden, dweight.zero_(), dbias.zero_()
    kept = [as_fp32(tensor) for tensor in coefficients]
    head.library.linear_token_logprob_bwd(
        head.pointers,
        *(address(tensor) for tensor in kept),
        address(dhidden) * needed[0],
        code(dhidden.dtype),
        dhidden.stride(0),
        address(dweight) * needed[1],
        dweight.stride(0),
        address(dbias) * needed[2],
    )
    return dhidden, dweight, dbias
