"""Argument checks shared by the public functions; all raise ValueError.

The `as_` functions convert equivalent types, such as numpy's numbers, to the type of the operations.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
IGNORED_TARGET = -100
_NUMPY_BOOLS = ("numpy.bool", "numpy.bool_")


def invalid(where: str, arg: str, expected: str, actual: object, remedy: str) -> ValueError:
    """The error for an invalid argument."""
    return ValueError(f"{where}: {arg} must be {expected}, got {actual}. {remedy}")


def checks_values(device: torch.device) -> bool:
    """Whether to check tensor values: always on a CPU, elsewhere with MGRPO_CHECK=1, because it synchronises."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get("MGRPO_CHECK") == "1"


def check_tensor(
    where: str,
    arg: str,
    value: object,
    layout: str,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """Check type, shape (None matches any size), dtype and device; `layout` is the shape's name in the error."""
    if not isinstance(value, Tensor):
        raise invalid(where, arg, f"a tensor {layout}", type(value).__name__, "Pass a torch.Tensor.")
    if value.layout != torch.strided:
        raise invalid(where, arg, "dense", str(value.layout).removeprefix("torch."), "Call .to_dense().")
    if value.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(value.shape, shape, strict=True)
    ):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise invalid(where, arg, f"of shape {layout} = [{sizes}]", list(value.shape), "Reshape it.")
    if value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise invalid(
            where, arg, f"of dtype {names}", str(value.dtype).removeprefix("torch."), "Convert it with .to()."
        )
    if device is not None and value.device != device:
        raise invalid(where, arg, f"on {device}", value.device, "Move it with .to().")


def check_choice(where: str, arg: str, value: str, choices: tuple[str, ...]) -> None:
    """Check a named option."""
    if not isinstance(value, str) or value not in choices:
        raise invalid(where, arg, f"one of {list(choices)}", repr(value), "Correct the name.")


def as_number(where: str, arg: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """A finite real number in [low, high], or (low, high] with open_low, as a Python number; not a bool."""
    number = value
    if isinstance(value, bool):
        number = None
    elif not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        number = _to_python(value)
    # Excludes infinities, integers that no float holds, and NaN.
    in_range = number is not None and abs(number) <= sys.float_info.max and low <= number <= high
    if number is None or not in_range or (open_low and number == low):
        interval = f"a finite number in {'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        raise invalid(where, arg, interval, repr(value), "Correct the value.")
    return number


def _to_python(value: Any) -> int | float | None:
    """The Python number of another library's number; None if it is not real, or too large for a float."""
    if isinstance(value, Integral):
        return int(value)
    try:
        return float(value) if isinstance(value, Real) else None
    except OverflowError:
        return None


def as_integer(where: str, arg: str, value: Any, low: int, high: int = 2**63 - 1) -> int:
    """An integer in [low, high] as a Python int; not a bool or a float with an integral value."""
    number = value
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or not low <= number <= high:
        expected = "an int of 64 bits" if low < 0 else f">= {low} and an int of 64 bits"
        raise invalid(where, arg, expected, repr(value), "Correct the value.")
    return number


def as_flag(where: str, arg: str, value: Any) -> bool:
    """True or False, also of numpy."""
    if not isinstance(value, bool) and f"{type(value).__module__}.{type(value).__name__}" not in _NUMPY_BOOLS:
        raise invalid(where, arg, "True or False", repr(value), "Correct the value.")
    return bool(value)


def as_list(
    where: str, arg: str, value: Any, of: str = "tensors", such_as: str = "model.parameters()"
) -> Sequence[Any]:
    """The entries of an ordered iterable, such as a list or a generator."""
    if isinstance(value, list | tuple):
        return value
    # A tensor would be split into rows, a dictionary into names, and a set has no order.
    if isinstance(value, Iterable) and not isinstance(value, Tensor | Mapping | Set | str | bytes):
        return list(value)
    raise invalid(where, arg, f"a list of {of}", type(value).__name__, f"Pass list({such_as}), say.")


def check_cu_seqlens(where: str, cu_seqlens: Tensor, tokens: int, device: torch.device) -> None:
    """Check sequence boundaries [N+1] over `tokens` packed tokens."""
    check_tensor(where, "cu_seqlens", cu_seqlens, "[N+1]", (None,), INTEGERS, device)
    if cu_seqlens.shape[0] == 0:
        raise invalid(where, "cu_seqlens", "of shape [N+1] with N >= 0", [0], "Start it with 0.")
    if checks_values(device):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != tokens or ends != sorted(ends):
            expected = f"non-decreasing from 0 to the {tokens} tokens"
            raise invalid(where, "cu_seqlens", expected, ends[:8], "Build it as the running sum of the lengths.")


def check_logits(where: str, logits: Tensor) -> None:
    """Check logits [T, V]."""
    check_tensor(where, "logits", logits, "[T, V]", (None, None), FLOATS)
    if logits.shape[1] == 0:
        raise invalid(where, "logits", "of shape [T, V] with V >= 1", list(logits.shape), "Pass a vocabulary.")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise invalid(where, "logits", "of unit stride along V", f"strides {logits.stride()}", "Call .contiguous().")


def check_head(where: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, budget_bytes: int | None) -> int | None:
    """Check hidden states, the head's weight and bias, and the memory budget, which is returned."""
    check_tensor(where, "hidden", hidden, "[T, D]", (None, None), FLOATS)
    check_tensor(where, "weight", weight, "[V, D]", (None, hidden.shape[1]), (hidden.dtype,), hidden.device)
    if weight.shape[0] == 0:
        raise invalid(where, "weight", "of shape [V, D] with V >= 1", list(weight.shape), "Pass a vocabulary.")
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise invalid(where, "weight", "of unit stride along D", f"strides {weight.stride()}", "Call .contiguous().")
    if bias is not None:
        check_tensor(where, "bias", bias, "[V]", (weight.shape[0],), FLOATS, hidden.device)
    return None if budget_bytes is None else as_integer(where, "budget_bytes", budget_bytes, 1)


def check_token_rows(
    where: str,
    targets: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    softcap: float | None,
    rows: int,
    vocabulary: int,
    device: torch.device,
) -> tuple[float | Tensor, float | None]:
    """Check what the two token log-prob functions share; temperature and softcap are returned."""
    check_tensor(where, "targets", targets, "[T]", (rows,), (torch.int64,), device)
    if mask is not None:
        check_tensor(where, "mask", mask, "[T]", (rows,), (torch.bool,), device)
    if softcap is not None:
        softcap = as_number(where, "softcap", softcap, 0.0, open_low=True)
    if isinstance(temperature, Tensor):
        check_tensor(where, "temperature", temperature, "[T]", (rows,), FLOATS, device)
    else:
        temperature = as_number(where, "temperature", temperature, 0.0, open_low=True)
    if not checks_values(device):
        return temperature, softcap
    active = targets != IGNORED_TARGET
    if mask is not None:
        active = active & mask
    wrong = active & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        expected = f"in [0, {vocabulary}) or {IGNORED_TARGET}"
        raise invalid(where, "targets", expected, int(targets[wrong][0]), "Mask rows that have no target.")
    if isinstance(temperature, Tensor):
        wrong = active & ~((temperature > 0) & temperature.isfinite())
        if wrong.any():
            raise invalid(where, "temperature", "finite and > 0", float(temperature[wrong][0]), "Mask unused rows.")
    return temperature, softcap
