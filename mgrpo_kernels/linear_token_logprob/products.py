"""The GPU backends: vocabulary tiles of logits by torch.mm with the row kernels of token_logprob.

A tile's statistics are those of token_logprob on its columns and merge as sums do; its gradient is token_logprob's
backward about the log-sum-exp of all tiles. Logits are fp32, products fp32-accumulated; gradients of bf16 logits are
rounded to bf16 before the two products that take them. Letters: see the package.

The forward may keep the first tiles' logits, so that the backward has two products, not three. Kept in fp32 they need
no additional pass: 14 B of traffic a logit forward and backward. Otherwise they are kept as fp16 differences to the
tile's largest logit, 18 B: the likelier a token, the smaller its difference and so its error. The error of gradients of
random rows is 1e-4 to 5e-4, before a rounding to bf16 of 2e-3; with bf16 exponentials it would be 4e-4 to 2e-3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mgrpo_kernels import ops  # noqa: F401  (defines torch.ops.mgrpo_kernels)
from mgrpo_kernels._common.rows import RowGrads, RowSums, scale_logits
from mgrpo_kernels.linear_token_logprob.tiles import full_precision, memory_budget, plan_tiles

_LOWEST = torch.finfo(torch.float32).min


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product in fp32: half operands go through the tensor cores of a GPU, and are upcast elsewhere."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _blocks(
    hidden: Tensor, weight: Tensor, budget_bytes: int | None, kept_columns: list[int], halved: bool
) -> Iterator[slice]:
    """The kept tiles, then those of the rest of the vocabulary."""
    start = 0
    for columns in kept_columns:
        yield slice(start, start + columns)
        start += columns
    # If all tiles are kept, the free memory of the GPU need not be queried.
    if start < weight.shape[0]:
        budget = memory_budget(hidden.device, budget_bytes) - (2 if halved else 4) * hidden.shape[0] * start
        tile = plan_tiles(hidden, weight.shape[0], budget, keep=False).columns
        for first in range(start, weight.shape[0], tile):
            yield slice(first, min(first + tile, weight.shape[0]))


def _halve(logits: Tensor, top: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """Differences of a tile's logits to an anchor by their largest z, and the anchor [T]."""
    # -inf cannot be subtracted.
    anchor = (top * scale).masked_fill(top <= _LOWEST, 0)
    return torch.sub(logits, anchor[:, None], out=torch.empty_like(logits, dtype=torch.float16)), anchor


def _tile_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, tile] fp32."""
    logits = _product(hidden, weight.T)
    return logits if bias is None else logits.add_(bias.float())


def cuda_row_sums(
    logits: Tensor,
    columns: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    self_certainty: bool,
    *,
    is_exact: bool,
) -> tuple[Tensor, ...]:
    """RowSums from the CUDA kernel's results on a tile; then z of the target, or 0.

    About the tile's log-sum-exp; for exact inputs about its largest z, at the cost of one more read: a log-sum-exp of
    40 is rounded by 2e-6, which is negligible for bf16 operands.
    """
    scale = temperature if temperatures is None else temperatures

    def pick(index: Tensor) -> Tensor:
        return scale_logits(logits.gather(1, index[:, None]), scale, softcap or None).squeeze(1)

    nearest = columns.clamp(0, logits.shape[1] - 1)
    z_target = pick(nearest).masked_fill(columns != nearest, 0)
    index = logits.argmax(1) if is_exact else nearest
    logprob, entropy, lse, certainty, num_finite = torch.ops.mgrpo_kernels.token_logprob_fwd(
        logits, index, None, temperature, temperatures, softcap, self_certainty, "cpu" if logits.is_cpu else "cuda"
    )
    empty = lse == -torch.inf
    top, log_exp = (pick(index), -logprob) if is_exact else (lse, torch.zeros_like(lse))
    exp = log_exp.exp()
    if not self_certainty:
        certainty = num_finite = torch.zeros_like(lse)
    sums = (exp, exp * (log_exp - entropy), (log_exp - certainty) * num_finite)
    return top.masked_fill(empty, _LOWEST), *(part.masked_fill(empty, 0) for part in sums), num_finite, z_target


def linear_token_logprob_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    budget_bytes: int | None,
    self_certainty: bool,
    kept_columns: list[int],
    halved: bool,
    *,
    row_sums: Callable[..., tuple[Tensor, ...]],
) -> tuple[Tensor | list[Tensor], ...]:
    """See ops.py; `row_sums` gives the sums of a tile of logits, and z of the targets that lie in it."""
    z_target, sums = hidden.new_zeros(hidden.shape[0], dtype=torch.float32), None
    scale = temperature if temperatures is None else temperatures
    kept, anchors = [], []
    with full_precision(hidden.device):
        for index, block in enumerate(_blocks(hidden, weight, budget_bytes, kept_columns, halved)):
            logits = _tile_logits(hidden, weight[block], None if bias is None else bias[block])
            *part, picked = row_sums(logits, columns - block.start, temperature, temperatures, softcap, self_certainty)
            z_target += picked
            sums = RowSums(*part) if sums is None else sums.merge(RowSums(*part))
            if index < len(kept_columns) and halved:
                logits, anchor = _halve(logits, part[0], scale)
                anchors.append(anchor)
            if index < len(kept_columns):
                kept.append(logits)
    assert sums is not None
    return *sums, z_target, kept, anchors


def _gradient(
    logits: Tensor,
    columns: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    logprob: Tensor,
    lse: Tensor,
    grads: RowGrads,
    *,
    in_place: bool,
    backend: str,
) -> Tensor:
    """Gradient of a tile's logits in fp32; of fp16 ones never in place."""
    nearest = columns.clamp(0, logits.shape[1] - 1)
    here = columns == nearest
    # The row kernel computes coefficients from upstream gradients: these result in the given ones.
    constant, onehot, slope, uniform = grads
    dlse = constant if uniform is None else constant - uniform
    own = None if onehot is None else onehot.masked_fill(~here, 0)
    dlse = dlse if own is None else dlse + own
    # For the kernel, a row whose target is outside the tile has one of probability 0.
    saved = (logprob.masked_fill(~here, -torch.inf), torch.zeros_like(lse), lse, torch.ones_like(lse))
    upstream = (own, None if slope is None else -slope, dlse, uniform)
    rest = (nearest, None, temperature, temperatures, softcap, *saved, *upstream, backend)
    if not in_place and logits.dtype == torch.float32:
        return torch.ops.mgrpo_kernels.token_logprob_bwd(logits, *rest)
    dlogits = logits.float()
    torch.ops.mgrpo_kernels.token_logprob_bwd_(dlogits, *rest)
    return dlogits


def linear_token_logprob_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    budget_bytes: int | None,
    logprob: Tensor,
    lse: Tensor,
    constant: Tensor,
    onehot: Tensor | None,
    slope: Tensor | None,
    uniform: Tensor | None,
    kept: list[Tensor],
    anchors: list[Tensor],
    fp32_dhidden: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    *,
    backend: str,
    bf16_gradient: Callable[..., None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.py; `bf16_gradient` writes a tile's gradient in bf16 without another pass."""
    dhidden = hidden.new_zeros(hidden.shape if needs_hidden else (0, 0), dtype=torch.float32)
    dweight = weight.new_empty(weight.shape if needs_weight else (0, 0))
    dbias = hidden.new_empty(weight.shape[0] if needs_bias else 0, dtype=torch.float32)
    grads, scale = RowGrads(constant, onehot, slope, uniform), (temperature, temperatures, softcap)
    is_direct = bf16_gradient is not None and hidden.dtype == torch.bfloat16 and not needs_bias
    with full_precision(hidden.device):
        widths = [logits.shape[1] for logits in kept]
        for index, block in enumerate(_blocks(hidden, weight, budget_bytes, widths, bool(anchors))):
            if index < len(kept):
                logits = kept[index]
            else:
                logits = _tile_logits(hidden, weight[block], None if bias is None else bias[block])
            about = lse
            if index < len(anchors):
                about = lse - anchors[index] / (temperature if temperatures is None else temperatures)
            rest = (columns - block.start, *scale)
            if bf16_gradient is not None and is_direct:
                dlogits = torch.empty_like(logits, dtype=torch.bfloat16)
                bf16_gradient(logits, dlogits, *rest, about, grads)
            else:
                dlogits = _gradient(logits, *rest, logprob, about, grads, in_place=index >= len(kept), backend=backend)
            if needs_bias:
                dbias[block] = dlogits.sum(0)
            # fp16 has no room for the small ones.
            if hidden.dtype == torch.bfloat16:
                dlogits = dlogits.to(torch.bfloat16)
            if needs_hidden:
                dhidden += _product(dlogits, weight[block] if dlogits.dtype == weight.dtype else weight[block].float())
            if needs_weight:
                dweight[block] = _product(dlogits.T, hidden if dlogits.dtype == hidden.dtype else hidden.float())
            del logits, dlogits  # before the next tile's
    return dhidden if fp32_dhidden else dhidden.to(hidden.dtype), dweight, dbias
