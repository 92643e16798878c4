"""Public function: log-probability and entropy from hidden states and the head's weight."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from mgrpo_kernels._common.checks import as_flag, check_head, check_token_rows
from mgrpo_kernels._common.shards import find_shard, local_head
from mgrpo_kernels.backends import implementations, resolve
from mgrpo_kernels.linear_token_logprob import autograd, reference
from mgrpo_kernels.linear_token_logprob.active import mask_on_device
from mgrpo_kernels.results import TokenLogprob

_IMPLEMENTATIONS = implementations(reference.linear_token_logprob, autograd.linear_token_logprob)


def linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    softcap: float | None = None,
    self_certainty: bool = False,
    budget_bytes: int | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> TokenLogprob:
    """token_logprob(hidden weight^T + bias, targets) without ever holding the [T, V] logits.

    Args:
        hidden: [T, D] fp32, bf16, fp16 or fp64.
        weight: [V, D], dtype of hidden; with `group`, the rows of this rank. Or a DTensor sharded on dim 0 of one
            dimension of its mesh, whose group is then `group`; its gradient is a DTensor placed alike.
        targets: [T] int64 in [0, V) of the whole vocabulary, or -100 for a masked row.
        bias: [V] float, added to the logits; with `group`, the part of this rank; with a DTensor one placed alike.
            May hold -inf.
        temperature: > 0; one number, or [T] float with one per row. It receives no gradient.
        mask: [T] bool; a False row gives 0 in every output and gets gradient 0, whatever it holds. It may lie on the
            CPU for hidden on a GPU: then such rows cost nothing, and nothing waits for the device to count them.
        softcap: c > 0 replaces the logits by c tanh(logits / c) ahead of the temperature.
        self_certainty: also return lse minus the mean of the row's finite z.
        budget_bytes: >= 1, bytes for temporaries beyond upcast copies of hidden and its gradient; default 64 MiB on a
            CPU, on a GPU a quarter of the memory that is free or unused in torch's cache. One vocabulary column at a
            time is the least that is used. Of it the GPU backends keep the logits for the backward: 4 T V bytes, 2 T V
            for bf16 where those do not fit, or as many as fit. Under torch.compile they do so only where it is given.
        group: process group over which the vocabulary is sharded in rank order. Hidden, targets, temperature and mask
            must be the same on every rank, and so must the gradients that reach the outputs.
        backend: "auto" or a name from `backends()`.

    Returns:
        TokenLogprob of [T] fp32 tensors (fp64 for fp64 inputs), in nats, differentiable with respect to hidden, weight
        and bias. With `group` every rank gets the same outputs and the whole gradient of hidden.

    Raises:
        ValueError: a shape, dtype, device or option is wrong; on a CPU, or with MGRPO_CHECK=1, also a target or
            temperature out of range. Elsewhere such a row is NaN.

    Numerics: products and sums are fp32, of operands upcast to it; gradients are rounded once, at the end. On backend
        "cpu" bf16 operands are multiplied as they are where the processor can, the gradient of the logits rounded to
        bf16 ahead of its two products, and no bit depends on the number of threads; fp32 and fp16 gradients are
        products of torch.mm. On a GPU logits that are kept in 2 bytes are fp16 differences to the largest near them.

    Cost: 2 T D V FLOP forward, 6 T D V backward (4 with a frozen weight), of which logits that were kept spare
        2 T D V. Rows that a mask on the CPU removes cost nothing, nor do, on backend "cpu" in the backward, rows whose
        upstream gradients are all 0.

    Source: Wijmans et al. 2024, arXiv 2411.09009, for the tiling; formulas as in `token_logprob`.
    """
    where = "linear_token_logprob"
    weight, bias, placed = local_head(where, weight, bias, group)
    budget_bytes = check_head(where, hidden, weight, bias, budget_bytes)
    self_certainty = as_flag(where, "self_certainty", self_certainty)
    shard = placed or find_shard(weight.shape[0], group, hidden.device)
    on_device = mask_on_device(where, mask, hidden)
    scale = check_token_rows(
        where, targets, temperature, on_device, softcap, hidden.shape[0], shard.vocabulary, hidden.device
    )
    temperature, softcap = scale
    return _IMPLEMENTATIONS[resolve(where, hidden.device, backend, (hidden.dtype,), _IMPLEMENTATIONS)](
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        mask=mask,
        softcap=softcap,
        self_certainty=self_certainty,
        budget_bytes=budget_bytes,
        shard=shard,
    )
