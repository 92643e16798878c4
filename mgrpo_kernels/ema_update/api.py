"""Public function: exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import add, attrgetter, le

import torch
from torch import Tensor

from mgrpo_kernels import ops  # noqa: F401  (defines torch.ops.mgrpo_kernels)
from mgrpo_kernels._common.checks import (
    FLOATS,
    INTEGERS,
    as_integer,
    as_list,
    as_number,
    check_choice,
    check_tensor,
    checks_values,
    invalid,
)
from mgrpo_kernels.backends import implementations, resolve
from mgrpo_kernels.ema_update import reference

_WHERE = "ema_update_"
_SHAPE, _DTYPE, _DEVICE, _NBYTES = (attrgetter(name) for name in ("shape", "dtype", "device", "nbytes"))


def _compiled(
    momentum: Sequence[Tensor],
    policy: Sequence[Tensor],
    decay: float | Tensor,
    *,
    rounding: str,
    compensation: Sequence[Tensor | None] | None,
    publish: Sequence[Tensor | None] | None,
    seed: int,
    step: int | Tensor,
    offsets: Sequence[int] | None,
    backend: str,
) -> None:
    """Any compiled backend."""
    if not momentum:
        return
    torch.ops.mgrpo_kernels.ema_update_(
        momentum,
        policy,
        _present(compensation),
        _indices(compensation),
        _present(publish),
        _indices(publish),
        0.0 if isinstance(decay, Tensor) else decay,
        decay if isinstance(decay, Tensor) else None,
        rounding == "stochastic",
        seed,
        0 if isinstance(step, Tensor) else step,
        step if isinstance(step, Tensor) else None,
        offsets or [],
        backend,
    )


_IMPLEMENTATIONS = implementations(reference.ema_update_, _compiled)


@torch.no_grad()
def ema_update_(
    momentum: Iterable[Tensor],
    policy: Iterable[Tensor],
    decay: float | Tensor,
    *,
    rounding: str = "nearest",
    compensation: Iterable[Tensor | None] | None = None,
    publish: Iterable[Tensor | None] | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    offsets: Iterable[int] | None = None,
    backend: str = "auto",
) -> None:
    """momentum[i] <- decay * momentum[i] + (1 - decay) * policy[i], in place.

    Args:
        momentum: contiguous float tensors of any shapes and mixed dtypes, on one device; tied weights appear once. All
            lists may be any iterables, such as `model.parameters()`.
        policy: as many tensors, each with the shape of its momentum; dtypes may differ.
        decay: number in [0, 1], or a 0-d float tensor: the share of the old weights kept. 0 copies, 1 freezes, exactly.
        rounding: how bf16 momentum is stored: "nearest" | "stochastic". Wider dtypes are always stored to nearest.
        compensation: for each tensor a bf16 tensor of its shape, zero at the start, that keeps what rounding its bf16
            momentum lost; None for a tensor without. Needs rounding "nearest".
        publish: for each tensor one of its shape that receives the new momentum in its own dtype; None to skip it.
        seed: int in [-2^63, 2^63), of the stochastic rounding.
        step: int >= 0 or 0-d integer tensor; a new step draws new random bits.
        offsets: for each momentum tensor the index, in [0, 2^63), of its first element in the whole tensor that it is a
            contiguous shard of; None: all 0. Stochastic rounding then stores the bits that an update of the whole
            tensors would store there. Other roundings do not depend on them.
        backend: "auto" or a name from `backends()`.

    Raises:
        ValueError: lists differ in length, or a shape, dtype, device, stride or option is wrong, or a tensor that is
            written shares memory with another argument; on a CPU, or with MGRPO_CHECK=1, also a decay tensor out of
            range. Elsewhere such a decay makes the momentum NaN.

    Numerics: fp32 (fp64 for fp64 momentum), by torch.lerp's formula: with w = 1 - decay, taken in fp64,
        momentum + w (policy - momentum) for w < 1/2, else policy + (w - 1) (policy - momentum). On a processor with
        a fused multiply-add the cpu backend gives the reference's bits, NaN payloads apart; on any, for any number of
        threads, its own.
        Stochastic rounding uses Philox 4x32-10 with counter (element // 4, step, tensor index), key seed, word
        element % 4, where element is the tensor's offset plus the index in the tensor, so that the bits depend on no
        thread, block or shard count. A bf16 momentum that is stored to nearest
        without compensation does not move at decays near 1.

    Cost: one read of both lists, one write of momentum (and of publish).

    Source: Tarvainen and Valpola 2017, arXiv 1703.01780; Salmon et al. 2011 for Philox; Kahan 1965 for compensation.
    """
    check_choice(_WHERE, "rounding", rounding, ("nearest", "stochastic"))
    momentum, policy = as_list(_WHERE, "momentum", momentum), as_list(_WHERE, "policy", policy)
    compensation = None if compensation is None else as_list(_WHERE, "compensation", compensation)
    publish = None if publish is None else as_list(_WHERE, "publish", publish)
    _check_lists(momentum, policy, compensation, publish, rounding)
    decay = _check_decay(decay)
    seed = as_integer(_WHERE, "seed", seed, -(2**63))
    if isinstance(step, Tensor):
        check_tensor(_WHERE, "step", step, "[]", (), INTEGERS)
    else:
        step = as_integer(_WHERE, "step", step, 0)
    offsets = _check_offsets(offsets, len(momentum), rounding)
    device = momentum[0].device if momentum else torch.device("cpu")
    dtypes = {tensor.dtype for tensor in [*momentum, *policy, *_present(publish)]}
    _IMPLEMENTATIONS[resolve(_WHERE, device, backend, tuple(dtypes), _IMPLEMENTATIONS)](
        momentum,
        policy,
        decay,
        rounding=rounding,
        compensation=compensation,
        publish=publish,
        seed=seed,
        step=step,
        offsets=offsets,
    )


def _check_decay(decay: float | Tensor) -> float | Tensor:
    """Check the decay, a number or a 0-d tensor; a tensor's value only where it may be read."""
    if not isinstance(decay, Tensor):
        return as_number(_WHERE, "decay", decay, 0.0, 1.0)
    check_tensor(_WHERE, "decay", decay, "[]", (), FLOATS)
    if checks_values(decay.device):
        as_number(_WHERE, "decay", float(decay), 0.0, 1.0)
    return decay


def _check_offsets(offsets: Iterable[int] | None, num_tensors: int, rounding: str) -> list[int] | None:
    """Check the offsets; None where no random bits depend on them."""
    if offsets is None:
        return None
    entries = as_list(_WHERE, "offsets", offsets, "integers", "offsets")
    _check_length("offsets", entries, num_tensors)
    checked = [as_integer(_WHERE, f"offsets[{index}]", entry, 0) for index, entry in enumerate(entries)]
    return checked if rounding == "stochastic" and any(checked) else None


def _check_length(name: str, entries: Sequence[object], num_tensors: int) -> None:
    """Check that there is an entry a momentum tensor."""
    if len(entries) != num_tensors:
        raise invalid(_WHERE, name, f"of length {num_tensors}", len(entries), "Give one entry per momentum tensor.")


def _present(tensors: Sequence[Tensor | None] | None) -> list[Tensor]:
    """The tensors of a list with gaps."""
    return [] if tensors is None else [tensor for tensor in tensors if tensor is not None]


def _indices(tensors: Sequence[Tensor | None] | None) -> list[int]:
    """Indices of the tensors in a list with gaps."""
    return [] if tensors is None else [index for index, tensor in enumerate(tensors) if tensor is not None]


def _check_lists(
    momentum: Sequence[Tensor],
    policy: Sequence[Tensor],
    compensation: Sequence[Tensor | None] | None,
    publish: Sequence[Tensor | None] | None,
    rounding: str,
) -> None:
    """Check lengths, all tensors, and that no written tensor shares memory."""
    if compensation is not None and rounding == "stochastic":
        raise invalid(_WHERE, "compensation", "None with stochastic rounding", "a list", "Choose one of the two.")
    for name, tensors in {"policy": policy, "compensation": compensation, "publish": publish}.items():
        if tensors is not None:
            _check_length(name, tensors, len(momentum))
    traced = torch.compiler.is_compiling()
    if traced or not _are_valid(momentum, policy, compensation, publish, rounding):
        _check_entries(momentum, policy, compensation, publish, rounding)
    # Neither a tracer's tensors nor those on the meta device have memory.
    if not traced and momentum and momentum[0].device.type != "meta":
        written = [*momentum, *_present(compensation), *_present(publish)]
        if not _are_apart([*written, *policy]):
            _check_overlap(momentum, policy, compensation, publish)


def _are_valid(
    momentum: Sequence[Tensor],
    policy: Sequence[Tensor],
    compensation: Sequence[Tensor | None] | None,
    publish: Sequence[Tensor | None] | None,
    rounding: str,
) -> bool:
    """Whether all tensors are valid; takes a quarter of the time of _check_entries, which names the invalid one."""
    compensated = [momentum[index] for index in _indices(compensation)]
    published = [momentum[index] for index in _indices(publish)]
    return (
        _fit(momentum, momentum, FLOATS)
        and _fit(policy, momentum, FLOATS)
        and _fit(_present(compensation), compensated, (torch.bfloat16,))
        and _fit(_present(publish), published, FLOATS)
        and all(dtype == torch.bfloat16 for dtype in map(_DTYPE, compensated))
        and not (rounding == "stochastic" and torch.float16 in map(_DTYPE, momentum))
    )


def _fit(tensors: Sequence[Tensor], momentum: Sequence[Tensor], dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether all are contiguous tensors of these dtypes, of the shape and on the one device of their momentum."""
    try:
        return (
            set(map(_DTYPE, tensors)) <= set(dtypes)
            and len({*map(_DEVICE, tensors), *map(_DEVICE, momentum[:1])}) <= 1
            and (tensors is momentum or list(map(_SHAPE, tensors)) == list(map(_SHAPE, momentum)))
            and all(map(Tensor.is_contiguous, tensors))
        )
    except (AttributeError, TypeError):  # not a tensor
        return False


def _check_entries(
    momentum: Sequence[Tensor],
    policy: Sequence[Tensor],
    compensation: Sequence[Tensor | None] | None,
    publish: Sequence[Tensor | None] | None,
    rounding: str,
) -> None:
    """Check tensor by tensor, for an error with the tensor's name."""
    device = getattr(momentum[0], "device", None) if momentum else None
    for index, old in enumerate(momentum):
        _check_entry(f"momentum[{index}]", old, old, FLOATS, device)
        _check_entry(f"policy[{index}]", policy[index], old, FLOATS, old.device)
        if rounding == "stochastic" and old.dtype == torch.float16:
            raise invalid(_WHERE, f"momentum[{index}]", "bf16 or wider for stochastic rounding", "float16", "Use bf16.")
        term = None if compensation is None else compensation[index]
        if term is not None:
            _check_entry(f"compensation[{index}]", term, old, (torch.bfloat16,), old.device)
            if old.dtype != torch.bfloat16:
                raise invalid(_WHERE, f"momentum[{index}]", "bf16 where compensated", old.dtype, "Give None for it.")
        copy = None if publish is None else publish[index]
        if copy is not None:
            _check_entry(f"publish[{index}]", copy, old, FLOATS, old.device)


def _check_entry(
    name: str, tensor: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device | None
) -> None:
    """Check one tensor of a list against the momentum that it belongs to."""
    shape = tuple(like.shape) if isinstance(like, Tensor) else ()
    check_tensor(_WHERE, name, tensor, "of its momentum", shape, dtypes, device)
    if not tensor.is_contiguous():
        raise invalid(_WHERE, name, "contiguous", f"strides {tensor.stride()}", "Pass the storage in its own order.")


def _are_apart(tensors: list[Tensor]) -> bool:
    """Whether no two contiguous tensors share memory: in order, each ends before the next begins."""
    starts = list(map(Tensor.data_ptr, tensors))
    ends = sorted(map(add, starts, map(_NBYTES, tensors)))
    return all(map(le, ends[:-1], sorted(starts)[1:]))


def _check_overlap(
    momentum: Sequence[Tensor],
    policy: Sequence[Tensor],
    compensation: Sequence[Tensor | None] | None,
    publish: Sequence[Tensor | None] | None,
) -> None:
    """Raise ValueError for a written tensor that shares bytes with another; policies may be tied."""
    extents = []
    lists = {"momentum": momentum, "policy": policy, "compensation": compensation or (), "publish": publish or ()}
    for name, tensors in lists.items():
        for index, tensor in enumerate(tensors):
            if tensor is not None and tensor.numel():
                start = tensor.data_ptr()
                extents.append((start, start + tensor.nbytes, name != "policy", f"{name}[{index}]"))
    furthest: dict[bool, tuple[int, str]] = {True: (0, ""), False: (0, "")}
    for start, end, written, name in sorted(extents):
        rivals = (True, False) if written else (True,)
        for rival in rivals:
            reach, other = furthest[rival]
            if start < reach:
                raise invalid(
                    _WHERE, name, f"apart from {other}", "shared memory", "Pass tied weights once; copy buffers."
                )
        furthest[written] = max(furthest[written], (end, name))
