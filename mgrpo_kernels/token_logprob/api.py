"""Public function: log-probability and entropy from logits."""

from __future__ import annotations

from torch import Tensor

from mgrpo_kernels._common.checks import as_flag, check_logits, check_token_rows, invalid
from mgrpo_kernels.backends import implementations, resolve
from mgrpo_kernels.results import TokenLogprob
from mgrpo_kernels.token_logprob import autograd, reference

_IMPLEMENTATIONS = implementations(reference.token_logprob, autograd.token_logprob)


def token_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    softcap: float | None = None,
    self_certainty: bool = False,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> TokenLogprob:
    """With z = logits / temperature: logprob = z_y - lse, entropy = -sum p log p, lse = log sum e^z, p = e^(z - lse).

    Args:
        logits: [T, V] fp32, bf16, fp16 or fp64, unit stride along V; rows may be strided. May hold -inf.
        targets: [T] int64 in [0, V), or -100 for a masked row.
        temperature: > 0; one number, or [T] float with one per row. It receives no gradient.
        mask: [T] bool; a False row gives 0 in every output and gets gradient 0, whatever it holds.
        softcap: c > 0 replaces the logits by c tanh(logits / c) ahead of the temperature (-inf becomes -c).
        self_certainty: also return lse minus the mean of the row's finite z.
        inplace_backward: write the gradient over the logits; they must not be read after the backward.
        backend: "auto" or a name from `backends()`.

    Returns:
        TokenLogprob of [T] fp32 tensors (fp64 for fp64 logits), in nats, all differentiable with respect to the logits.
        A target at -inf gives logprob -inf, whose gradient is 0.

    Raises:
        ValueError: a shape, dtype, device, stride or option is wrong; on a CPU, or with MGRPO_CHECK=1, also a target or
            temperature out of range. Elsewhere such a row is NaN.

    Numerics: logits are upcast before the temperature divides them; sums in fp32. The entropy is log s - t / s with
        s = sum e^(z - max) and t = sum e^(z - max) (z - max), which does not cancel for large logits.

    Cost: one read of the logits forward; one read and one write backward.

    Source: Shannon entropy and the softmax; self-certainty from Kang et al. 2025, arXiv 2502.18581.
    """
    where = "token_logprob"
    check_logits(where, logits)
    rows, vocabulary = logits.shape
    self_certainty = as_flag(where, "self_certainty", self_certainty)
    inplace_backward = as_flag(where, "inplace_backward", inplace_backward)
    if inplace_backward and rows > 1 and logits.stride(0) < vocabulary:
        raise invalid(where, "logits", "free of overlapping rows for inplace_backward", logits.stride(), "Copy it.")
    scale = check_token_rows(where, targets, temperature, mask, softcap, rows, vocabulary, logits.device)
    temperature, softcap = scale
    return _IMPLEMENTATIONS[resolve(where, logits.device, backend, (logits.dtype,), _IMPLEMENTATIONS)](
        logits,
        targets,
        temperature=temperature,
        mask=mask,
        softcap=softcap,
        self_certainty=self_certainty,
        inplace_backward=inplace_backward,
    )
