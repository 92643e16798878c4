"""Public function: exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgrpo_kernels._checks import FLOATS, INTEGERS, check_choice, check_number, check_tensor, checks_values, invalid
from mgrpo_kernels.backends import resolve
from mgrpo_kernels.ema_update import reference

_WHERE = "ema_update_"
_IMPLEMENTATIONS = {"reference": reference.ema_update_}


@torch.no_grad()
def ema_update_(
    momentum: Sequence[Tensor],
    policy: Sequence[Tensor],
    decay: float | Tensor,
    *,
    rounding: str = "nearest",
    compensation: Sequence[Tensor | None] | None = None,
    publish: Sequence[Tensor | None] | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    backend: str = "auto",
) -> None:
    """momentum[i] <- decay * momentum[i] + (1 - decay) * policy[i], in place.

    Args:
        momentum: contiguous float tensors of any shapes and mixed dtypes, on one device; tied weights appear once.
        policy: as many tensors, each with the shape of its momentum; dtypes may differ.
        decay: number in [0, 1], or a 0-d float tensor: the share of the old weights kept. 0 copies, 1 freezes, exactly.
        rounding: how bf16 momentum is stored: "nearest" | "stochastic". Wider dtypes are always stored to nearest.
        compensation: for each tensor a bf16 tensor of its shape, zero at the start, that keeps what rounding its bf16
            momentum lost; None for a tensor without. Needs rounding "nearest".
        publish: for each tensor one of its shape that receives the new momentum in its own dtype; None to skip it.
        seed: int in [-2^63, 2^63), of the stochastic rounding.
        step: int >= 0 or 0-d integer tensor; a new step draws new random bits.
        backend: "auto" or a name from `backends()`.

    Raises:
        ValueError: lists differ in length, or a shape, dtype, device, stride or option is wrong, or a tensor that is
            written shares memory with another argument; on a CPU, or with MGRPO_CHECK=1, also a decay tensor out of
            range. Elsewhere such a decay makes the momentum NaN.

    Numerics: fp32 (fp64 for fp64 momentum) as momentum + (1 - decay) (policy - momentum), 1 - decay taken in fp64.
        Stochastic rounding uses Philox 4x32-10 with counter (element // 4, step, tensor index), key seed, word
        element % 4, so that the bits depend on no thread or block count. A bf16 momentum that is stored to nearest
        without compensation does not move at decays near 1.

    Cost: one read of both lists, one write of momentum (and of publish).

    Source: Tarvainen and Valpola 2017, arXiv 1703.01780; Salmon et al. 2011 for Philox; Kahan 1965 for compensation.
    """
    check_choice(_WHERE, "rounding", rounding, ("nearest", "stochastic"))
    _check_lists(momentum, policy, compensation, publish, rounding)
    _check_decay(decay)
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise invalid(_WHERE, "seed", "an int of 64 bits", repr(seed), "Correct the value.")
    if isinstance(step, Tensor):
        check_tensor(_WHERE, "step", step, "[]", (), INTEGERS)
    elif step < 0:
        raise invalid(_WHERE, "step", ">= 0", step, "Count optimiser steps from 0.")
    device = momentum[0].device if momentum else torch.device("cpu")
    _IMPLEMENTATIONS[resolve(_WHERE, device, backend)](
        momentum,
        policy,
        decay,
        rounding=rounding,
        compensation=compensation,
        publish=publish,
        seed=seed,
        step=step,
    )


def _check_decay(decay: float | Tensor) -> None:
    """Check a number, or a 0-d tensor where its value may be read."""
    if not isinstance(decay, Tensor):
        check_number(_WHERE, "decay", decay, 0.0, 1.0)
        return
    check_tensor(_WHERE, "decay", decay, "[]", (), FLOATS)
    if checks_values(decay.device):
        check_number(_WHERE, "decay", float(decay), 0.0, 1.0)


def _check_lists(
    momentum: Sequence[Tensor],
    policy: Sequence[Tensor],
    compensation: Sequence[Tensor | None] | None,
    publish: Sequence[Tensor | None] | None,
    rounding: str,
) -> None:
    """Check lengths, every tensor, and that nothing written shares memory."""
    if compensation is not None and rounding == "stochastic":
        raise invalid(_WHERE, "compensation", "None with stochastic rounding", "a list", "Choose one of the two.")
    lists = {"policy": policy, "compensation": compensation, "publish": publish}
    for name, tensors in lists.items():
        if tensors is not None and len(tensors) != len(momentum):
            raise invalid(
                _WHERE, name, f"of length {len(momentum)}", len(tensors), "Give one entry per momentum tensor."
            )
    extents = []
    device = getattr(momentum[0], "device", None) if momentum else None
    for index, old in enumerate(momentum):
        _check_entry(f"momentum[{index}]", old, old, FLOATS, device)
        _check_entry(f"policy[{index}]", policy[index], old, FLOATS, old.device)
        extents += [_extent(f"momentum[{index}]", old, True), _extent(f"policy[{index}]", policy[index], False)]
        if rounding == "stochastic" and old.dtype == torch.float16:
            raise invalid(_WHERE, f"momentum[{index}]", "bf16 or wider for stochastic rounding", "float16", "Use bf16.")
        for name, dtypes in (("compensation", (torch.bfloat16,)), ("publish", FLOATS)):
            tensors = lists[name]
            entry = None if tensors is None else tensors[index]
            if entry is not None:
                _check_entry(f"{name}[{index}]", entry, old, dtypes, old.device)
                extents.append(_extent(f"{name}[{index}]", entry, True))
                if name == "compensation" and old.dtype != torch.bfloat16:
                    raise invalid(
                        _WHERE, f"momentum[{index}]", "bf16 where compensated", old.dtype, "Give None for it."
                    )
    _check_overlap(extents)


def _check_entry(
    name: str, tensor: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device | None
) -> None:
    """Check one tensor of a list against the momentum that it belongs to."""
    shape = tuple(like.shape) if isinstance(like, Tensor) else ()
    check_tensor(_WHERE, name, tensor, "of its momentum", shape, dtypes, device)
    if not tensor.is_contiguous():
        raise invalid(_WHERE, name, "contiguous", f"strides {tensor.stride()}", "Pass the storage in its own order.")


def _extent(name: str, tensor: Tensor, written: bool) -> tuple[int, int, bool, str]:
    """Memory range of a contiguous tensor."""
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size(), written, name


def _check_overlap(extents: list[tuple[int, int, bool, str]]) -> None:
    """Refuse a range that is written and shares bytes with another."""
    furthest: dict[bool, tuple[int, str]] = {True: (0, ""), False: (0, "")}
    for start, end, written, name in sorted(extents):
        if start == end:
            continue
        rivals = (True, False) if written else (True,)
        for rival in rivals:
            reach, other = furthest[rival]
            if start < reach:
                raise invalid(
                    _WHERE, name, f"apart from {other}", "shared memory", "Pass tied weights once; copy buffers."
                )
        furthest[written] = max(furthest[written], (end, name))
