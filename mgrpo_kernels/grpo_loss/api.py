"""Public functions: clipped policy-gradient losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mgrpo_kernels._common.checks import (
    FLOATS,
    INTEGERS,
    as_number,
    check_choice,
    check_cu_seqlens,
    check_head,
    check_logits,
    check_tensor,
    check_token_rows,
    checks_values,
    invalid,
)
from mgrpo_kernels._common.shards import find_shard, local_head
from mgrpo_kernels._common.structs import LossInputs, LossOptions
from mgrpo_kernels.backends import implementations, resolve
from mgrpo_kernels.grpo_loss import autograd, reference
from mgrpo_kernels.linear_token_logprob.active import mask_on_device
from mgrpo_kernels.results import GrpoLoss

_GRPO_LOSS = implementations(reference.grpo_loss, autograd.grpo_loss)
_LOGITS_GRPO_LOSS = implementations(reference.logits_grpo_loss, autograd.logits_grpo_loss)
_LINEAR_GRPO_LOSS = implementations(reference.linear_grpo_loss, autograd.linear_grpo_loss)


def grpo_loss(
    logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
    tis_cap: float = 2.0,
    ratio: str = "token",
    reduce: str = "token_mean",
    max_length: int | None = None,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
) -> GrpoLoss:
    """loss_t = -w_t min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) + kl_coef KL_t - entropy_coef H_t.

    Token-shaped means [T] with cu_seqlens, or [N, L] without. Tokens outside the mask may hold anything.

    Args:
        logprob: token-shaped float, nats, of the policy in training.
        advantage: [N] float, one a sequence (also where N = T), or token-shaped. Detached.
        mask: token-shaped bool, the tokens that train.
        old_logprob: token-shaped float, nats; rho_t = exp(logprob - old_logprob). Default: logprob detached.
        ref_logprob: token-shaped float, nats, of the reference; needed where kl_coef > 0.
        rollout_logprob: token-shaped float, nats, of the rollout engine; w_t = min(exp(old - rollout), tis_cap),
            detached. Without it w_t = 1.
        entropy: token-shaped float, nats, of the policy; needed where entropy_coef is not 0.
        cu_seqlens: [N+1] int32 or int64, boundaries of packed sequences.
        clip_low: in [0, 1].
        clip_high: >= 0.
        dual_clip: > 1; for A < 0 the surrogate is at least dual_clip A.
        kl_coef: >= 0.
        kl: with d = ref - logprob: "k1" = -d | "k2" = d^2 / 2 | "k3" = e^d - d - 1.
        entropy_coef: any finite number.
        tis_cap: > 0.
        ratio: "token", or "sequence": rho = exp of the sequence's mean log-ratio, with its gradient through each token.
        reduce: "token_mean" (sum / mask tokens) | "sequence_mean_token_mean" (mean over N of each sequence's token
            mean) | "constant" (sum / (N max_length)).
        max_length: >= 1, for "constant".
        normalizer: > 0, a number or 0-d tensor, in place of the mask tokens, of N, or of N max_length: with the whole
            step's value the losses of micro-batches add up.
        backend: "auto" or a name from `backends()`.

    Returns:
        GrpoLoss: loss 0-d fp32 (fp64 for fp64 logprob), differentiable in logprob and entropy; metrics, 0-d fp32 and
        detached, over mask tokens: ratio_mean, clip_low_share (rho below the band, A < 0), clip_high_share (above,
        A > 0), kl (0 without a reference), entropy (0 without one), tis_mean, tis_clipped_share. An empty mask gives 0.

    Raises:
        ValueError: a shape, dtype, device or option is wrong, or an argument that an option needs is missing; on a CPU,
            or with MGRPO_CHECK=1, also cu_seqlens or a normalizer out of range.

    Numerics: fp32, summed in a fixed order. Log-probs are floored at -1e4, so that -inf on both sides is ratio 1; a
        floored logprob receives no gradient.

    Cost: one read of each token tensor.

    Source: PPO (arXiv 1707.06347), DeepSeekMath (2402.03300), Dr. GRPO (2503.20783), GSPO (2507.18071), dual clip
        (1912.09729), truncated importance weights (Yao et al. 2025).
    """
    where = "grpo_loss"
    inputs = LossInputs(advantage, mask, old_logprob, ref_logprob, rollout_logprob, cu_seqlens, None)
    options = LossOptions(
        clip_low, clip_high, dual_clip, kl_coef, kl, entropy_coef, tis_cap, ratio, reduce, max_length, None
    )
    if cu_seqlens is None:
        check_tensor(where, "logprob", logprob, "[N, L]", (None, None), FLOATS)
    else:
        check_tensor(where, "logprob", logprob, "[T]", (None,), FLOATS)
    _check_tokens(where, tuple(logprob.shape), logprob.device, inputs, entropy)
    inputs, options = _check_options(where, inputs, options, normalizer, logprob.device)
    if options.entropy_coef != 0 and entropy is None:
        raise invalid(where, "entropy", "given where entropy_coef is not 0", None, "Pass it or set entropy_coef=0.")
    return _GRPO_LOSS[resolve(where, logprob.device, backend, (logprob.dtype,), _GRPO_LOSS)](
        logprob, entropy, inputs, options
    )


def logits_grpo_loss(
    logits: Tensor,
    targets: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
    tis_cap: float = 2.0,
    ratio: str = "token",
    reduce: str = "token_mean",
    max_length: int | None = None,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
) -> GrpoLoss:
    """grpo_loss of the log-prob and entropy of token_logprob(logits / temperature, targets).

    Args:
        logits: [T, V] fp32, bf16, fp16 or fp64, packed; the only input that receives a gradient.
        targets: [T] int64 in [0, V); a row of -100 is masked.
        advantage: [N] float, or [T].
        mask: [T] bool, the tokens that train; the other rows may hold anything and get gradient 0.
        temperature: > 0; one number, or [T] float.
        cu_seqlens: [N+1] int32 or int64, boundaries of the sequences; required.
        old_logprob, ref_logprob, rollout_logprob: [T] float, nats, as in `grpo_loss`.
        clip_low, clip_high, dual_clip, kl_coef, kl, entropy_coef, tis_cap: as in `grpo_loss`.
        ratio, reduce, max_length, normalizer, backend: as in `grpo_loss`.

    Returns:
        GrpoLoss as `grpo_loss`; the entropy metric is always that of the logits.

    Raises:
        ValueError: as `grpo_loss` and `token_logprob`.

    Numerics: as `token_logprob` and `grpo_loss`. A bf16 gradient is rounded for an upstream gradient of 1, and again
        after the product with another one; fp16 ones only after it, so that a loss scale reaches them.

    Cost: with ratio="token" a compiled backend reads the logits and writes their gradient once, both in the forward,
        which holds it until the backward; a second backward, and fp16 logits, take one more read and write. Else one
        read forward, one read and one write backward.

    Source: as `grpo_loss`.
    """
    where = "logits_grpo_loss"
    inputs = LossInputs(advantage, mask, old_logprob, ref_logprob, rollout_logprob, cu_seqlens, None)
    options = LossOptions(
        clip_low, clip_high, dual_clip, kl_coef, kl, entropy_coef, tis_cap, ratio, reduce, max_length, None
    )
    check_logits(where, logits)
    num_rows, vocabulary = logits.shape
    _check_packed(where, cu_seqlens)
    _check_tokens(where, (num_rows,), logits.device, inputs)
    temperature, _ = check_token_rows(where, targets, temperature, mask, None, num_rows, vocabulary, logits.device)
    inputs, options = _check_options(where, inputs, options, normalizer, logits.device)
    return _LOGITS_GRPO_LOSS[resolve(where, logits.device, backend, (logits.dtype,), _LOGITS_GRPO_LOSS)](
        logits, targets, temperature=temperature, inputs=inputs, options=options
    )


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    budget_bytes: int | None = None,
    group: ProcessGroup | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
    tis_cap: float = 2.0,
    ratio: str = "token",
    reduce: str = "token_mean",
    max_length: int | None = None,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
) -> GrpoLoss:
    """grpo_loss of the log-prob and entropy of token_logprob(hidden weight^T / temperature, targets).

    Args:
        hidden: [T, D] fp32, bf16, fp16 or fp64, packed.
        weight: [V, D], dtype of hidden; with `group`, the rows of this rank; or a DTensor, as in
            `linear_token_logprob`.
        targets: [T] int64 in [0, V) of the whole vocabulary; a row of -100 is masked.
        advantage: [N] float, or [T].
        mask: [T] bool, the tokens that train; the other rows may hold anything and get gradient 0. On the CPU for
            hidden on a GPU it spares their products, as in `linear_token_logprob`.
        temperature: > 0; one number, or [T] float.
        budget_bytes, group: as in `linear_token_logprob`.
        cu_seqlens: [N+1] int32 or int64, boundaries of the sequences; required.
        old_logprob, ref_logprob, rollout_logprob: [T] float, nats, as in `grpo_loss`.
        clip_low, clip_high, dual_clip, kl_coef, kl, entropy_coef, tis_cap: as in `grpo_loss`.
        ratio, reduce, max_length, normalizer, backend: as in `grpo_loss`.

    Returns:
        GrpoLoss as `grpo_loss`, differentiable in hidden and weight; the entropy metric is always that of the logits.

    Raises:
        ValueError: as `grpo_loss` and `linear_token_logprob`.

    Numerics: as `linear_token_logprob` and `grpo_loss`.

    Cost: as `linear_token_logprob`.

    Source: as `grpo_loss`.
    """
    where = "linear_grpo_loss"
    inputs = LossInputs(advantage, mask, old_logprob, ref_logprob, rollout_logprob, cu_seqlens, None)
    options = LossOptions(
        clip_low, clip_high, dual_clip, kl_coef, kl, entropy_coef, tis_cap, ratio, reduce, max_length, None
    )
    weight, _, placed = local_head(where, weight, None, group)
    budget_bytes = check_head(where, hidden, weight, None, budget_bytes)
    shard = placed or find_shard(weight.shape[0], group, hidden.device)
    _check_packed(where, cu_seqlens)
    inputs = inputs._replace(mask=mask_on_device(where, mask, hidden))
    _check_tokens(where, (hidden.shape[0],), hidden.device, inputs)
    temperature, _ = check_token_rows(
        where, targets, temperature, inputs.mask, None, hidden.shape[0], shard.vocabulary, hidden.device
    )
    inputs, options = _check_options(where, inputs, options, normalizer, hidden.device)
    name = resolve(where, hidden.device, backend, (hidden.dtype,), _LINEAR_GRPO_LOSS)
    return _LINEAR_GRPO_LOSS[name](
        hidden,
        weight,
        targets,
        temperature=temperature,
        budget_bytes=budget_bytes,
        shard=shard,
        inputs=inputs if name == "reference" else inputs._replace(mask=mask),
        options=options,
    )


def _check_packed(where: str, cu_seqlens: Tensor | None) -> None:
    """Check that cu_seqlens is given: rows of logits are always packed."""
    if cu_seqlens is None:
        raise invalid(where, "cu_seqlens", "given", None, "Pass [0, T] for one sequence.")


def _check_tokens(
    where: str, shape: tuple[int, ...], device: torch.device, inputs: LossInputs, entropy: Tensor | None = None
) -> None:
    """Check all tensors with a token or sequence dimension."""
    layout, advantage = "[N, L]" if inputs.cu_seqlens is None else "[T]", inputs.advantage
    if inputs.cu_seqlens is not None:
        check_cu_seqlens(where, inputs.cu_seqlens, shape[0], device)
    check_tensor(where, "mask", inputs.mask, layout, shape, (torch.bool,), device)
    if not isinstance(advantage, Tensor) or tuple(advantage.shape) != shape:
        check_tensor(where, "advantage", advantage, f"[N] or {layout}", (inputs.num_sequences,), FLOATS, device)
    check_tensor(where, "advantage", advantage, layout, tuple(advantage.shape), FLOATS, device)
    logprobs = {name: getattr(inputs, name) for name in ("old_logprob", "ref_logprob", "rollout_logprob")}
    for name, tensor in (logprobs | {"entropy": entropy}).items():
        if tensor is not None:
            check_tensor(where, name, tensor, layout, shape, FLOATS, device)


def _check_options(
    where: str, inputs: LossInputs, options: LossOptions, normalizer: float | Tensor | None, device: torch.device
) -> tuple[LossInputs, LossOptions]:
    """Check all options; returns the inputs and options with the normalizer in its place and Python numbers."""
    least = {"clip_high": 0.0, "kl_coef": 0.0, "entropy_coef": -float("inf")}
    numbers = {name: as_number(where, name, getattr(options, name), low) for name, low in least.items()}
    numbers["clip_low"] = as_number(where, "clip_low", options.clip_low, 0.0, 1.0)
    numbers["tis_cap"] = as_number(where, "tis_cap", options.tis_cap, 0.0, open_low=True)
    if options.dual_clip is not None:
        numbers["dual_clip"] = as_number(where, "dual_clip", options.dual_clip, 1.0, open_low=True)
    check_choice(where, "kl", options.kl, ("k1", "k2", "k3"))
    check_choice(where, "ratio", options.ratio, ("token", "sequence"))
    check_choice(where, "reduce", options.reduce, ("token_mean", "sequence_mean_token_mean", "constant"))
    if numbers["kl_coef"] > 0 and inputs.ref_logprob is None:
        raise invalid(where, "ref_logprob", "given where kl_coef > 0", None, "Pass it or set kl_coef=0.")
    if options.max_length is not None:
        numbers["max_length"] = as_number(where, "max_length", options.max_length, 1)
    elif options.reduce == "constant" and normalizer is None:
        raise invalid(where, "max_length", 'given for reduce="constant"', None, "Pass it or a normalizer.")
    if isinstance(normalizer, Tensor):
        check_tensor(where, "normalizer", normalizer, "[]", (), FLOATS + INTEGERS, device)
        if checks_values(device):
            as_number(where, "normalizer", float(normalizer), 0.0, open_low=True)
        inputs = inputs._replace(normalizer=normalizer)
    elif normalizer is not None:
        numbers["denominator"] = as_number(where, "normalizer", normalizer, 0.0, open_low=True)
    return inputs, options._replace(**numbers)
