"""Tools for tests of operations: hard inputs, an error budget without hand-picked tolerances, and mutants."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Op = Callable[..., Any]
Mutant = Callable[[Op], Op]


def peaked_logits(
    rows: int, vocabulary: int, *, dtype: torch.dtype = torch.float32, boosted: int = 3, seed: int = 0
) -> Tensor:
    """[T, V] normal logits with a few a row raised by 4 to 12: flat rows hide errors behind tiny probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator)
    peaks = torch.rand(rows, vocabulary, generator=generator).argsort(1)[:, :boosted]
    return logits.scatter_add(1, peaks, 4 + 8 * torch.rand(peaks.shape, generator=generator)).to(dtype)


def poison_masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """A copy with NaN where the mask, which covers the leading dimensions, is False."""
    return tensor.masked_fill(~mask.reshape(*mask.shape, *[1] * (tensor.dim() - mask.dim())), torch.nan)


def exponent_length(logits: Tensor, temperature: float) -> int:
    """Addition to the reduction length of e^(z/T) by the rounding of exponents: the square of the largest exponent.

    An exponent is rounded by eps times its size, at most the spread of the logits [T, V] over the temperature.
    """
    lowest, highest = logits.nan_to_num(0, 0, 0).aminmax()
    return int((float(highest - lowest) / temperature) ** 2)


def assert_within_budget(
    actual: Tensor,
    oracle: Tensor,
    reference: Tensor,
    *,
    reduction_length: int,
    largest_term: float = 0.0,
    what: str = "output",
) -> None:
    """Largest error against the fp64 oracle <= 2 x that of a reference in the tested dtype + the rounding of a sum.

    The last term is fp32 eps (fp64's for fp64) times the oracle's size times the square root of the reduction length,
    the growth of independent rounding errors. `largest_term` takes the place of the oracle's size where the terms of a
    sum cancel. Where the oracle is infinite, the result must be the same infinity.
    """
    assert oracle.dtype == torch.float64, "the oracle must be fp64"
    assert actual.shape == oracle.shape == reference.shape, f"{what}: {actual.shape}, {oracle.shape}, {reference.shape}"
    infinite = oracle.isinf()
    assert torch.equal(actual.double()[infinite], oracle[infinite]), f"{what}: infinities differ"
    finite = ~infinite
    if not finite.any():
        return
    eps = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).eps
    slack = eps * math.sqrt(reduction_length) * max(float(oracle[finite].abs().max()), largest_term)
    error = float((actual.double() - oracle)[finite].abs().max())
    baseline = float((reference.double() - oracle)[finite].abs().max())
    assert error <= 2 * baseline + slack, f"{what}: error {error:.3e} > 2 x {baseline:.3e} + {slack:.3e}"


def assert_gradient_within_budget(
    actual: Tensor,
    oracle: Tensor,
    reference: Tensor,
    targets: Tensor,
    *,
    reduction_length: int,
    largest_term: float = 0.0,
) -> None:
    """Budget of a gradient [T, V], separately for the target column and the others, which are far smaller."""
    is_target = torch.nn.functional.one_hot(targets.clamp_min(0), oracle.shape[1]).bool()
    for name, columns in (("target column", is_target), ("other columns", ~is_target)):
        parts = (tensor.masked_select(columns) for tensor in (actual, oracle, reference))
        sizes = {"reduction_length": reduction_length, "largest_term": largest_term}
        assert_within_budget(*parts, what=f"gradient, {name}", **sizes)


class _RoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype) -> Tensor:  # pyright: ignore
        ctx.dtype = dtype
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return grads[0].to(ctx.dtype).to(grads[0].dtype), None


def round_gradient(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, with its gradient rounded to a dtype: for the reference of an operation that rounds it too."""
    return _RoundedGradient.apply(tensor, dtype)  # pyright: ignore[reportReturnType]


def map_tensors(change: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    """Apply `change` to every tensor of a result: a tensor, a named tuple, a dictionary or None."""
    if isinstance(outputs, Tensor):
        return change(outputs)
    if isinstance(outputs, Mapping):
        return {name: map_tensors(change, value) for name, value in outputs.items()}
    if isinstance(outputs, tuple):
        return type(outputs)(*(map_tensors(change, value) for value in outputs))
    return outputs


def on_outputs(change: Callable[[Tensor], Tensor]) -> Mutant:
    """A mutant that changes results."""

    def mutate(op: Op) -> Op:
        return lambda *args, **kwargs: map_tensors(change, op(*args, **kwargs))

    return mutate


def on_argument(names: Iterable[str], change: Callable[[Any], Any]) -> Mutant:
    """A mutant that changes the named keyword arguments."""

    def mutate(op: Op) -> Op:
        def mutated(*args: Any, **kwargs: Any) -> Any:
            spoiled = {name: change(kwargs[name]) for name in names if kwargs.get(name) is not None}
            return op(*args, **(kwargs | spoiled))

        return mutated

    return mutate


def _zeros(tensor: Tensor) -> Tensor:
    return tensor * 0 if tensor.is_floating_point() else torch.zeros_like(tensor)


def _scaled(tensor: Tensor) -> Tensor:
    return tensor * 0.9 if tensor.is_floating_point() else tensor


def _shifted(tensor: Tensor) -> Tensor:
    return tensor.roll(1, 0) if tensor.dim() else tensor


def _without_tail(tensor: Tensor) -> Tensor:
    if not tensor.dim():
        return tensor
    computed = torch.arange(tensor.shape[0]) < tensor.shape[0] - max(1, tensor.shape[0] // 8)
    return torch.where(computed.reshape(-1, *[1] * (tensor.dim() - 1)), tensor, torch.zeros_like(tensor))


MUTANTS: dict[str, Mutant] = {
    "zeros": on_outputs(_zeros),
    "scaled_0.9": on_outputs(_scaled),
    "shifted_row": on_outputs(_shifted),
    "last_tile_skipped": on_outputs(_without_tail),
    "dropped_mask": on_argument(("mask", "keep"), torch.ones_like),
    "wrong_temperature": on_argument(("temperature",), lambda temperature: temperature * 1.1),
}


def assert_mutants_rejected(
    op: Op, check: Callable[[Op], None], *, extra: Mapping[str, Mutant] | None = None, without: Iterable[str] = ()
) -> None:
    """Assert that `check` accepts `op` and raises AssertionError for each mutant of it.

    `check` passes mask, keep and temperature by keyword. `without` names the mutants that cannot apply.
    """
    check(op)
    for name, mutant in (MUTANTS | dict(extra or {})).items():
        if name in without:
            continue
        try:
            check(mutant(op))
        except AssertionError:
            continue
        raise AssertionError(f"the assertions accept the mutant {name!r}")
