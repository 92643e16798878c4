"""What every public function takes as a number, a flag, a name, a list or a tensor, and what it says of the rest."""

from __future__ import annotations

import decimal
import fractions
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mgrpo_kernels as K
from mgrpo_kernels.operations import OPERATIONS

# The forms of every argument error; a backend's tells what is available.
MESSAGE = r"^{op}: {arg}\S* must be .+, got .+\. .+\.$"
BACKENDS = [name for name, state in K.backends().items() if state.available]
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
T, V, D = 5, 7, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TARGETS, MASK, CUTS = torch.arange(T) * 3 % V, torch.arange(T) != 1, torch.tensor([0, 2, T])
LOSS = {
    "advantage": torch.tensor([1.5, -0.5]),
    "mask": MASK,
    "cu_seqlens": CUTS,
    **{name: -normal(T, seed=4 + i).abs() for i, name in enumerate(("old_logprob", "ref_logprob", "rollout_logprob"))},
    **{"clip_low": 0.25, "clip_high": 0.5, "dual_clip": 3.0, "kl_coef": 0.125, "entropy_coef": 0.5, "tis_cap": 2.0},
    **{"kl": "k3", "ratio": "token", "reduce": "constant", "max_length": 4, "normalizer": 8.0},
}
ROWS = {"targets": TARGETS, "temperature": 0.75, "mask": MASK}
HEAD = {"hidden": normal(T, D), "weight": normal(V, D, seed=1), "budget_bytes": 4096, "group": None} | ROWS
LEVELS = {"softcap": 30.0, "self_certainty": True}
GROUPS = {"keep": torch.ones(2, 4, dtype=torch.bool)}
# Every argument of every function, each given.
CALLS: dict[str, dict[str, Any]] = {
    "token_logprob": {"logits": normal(T, V), **ROWS, **LEVELS, "inplace_backward": False},
    "linear_token_logprob": {**HEAD, **LEVELS, "bias": normal(V)},
    "trajectory_entropy": {"token_entropy": normal(T), "cu_seqlens": CUTS, "mask": None, "reduce": "mean"},
    "group_advantage": {"rewards": normal(2, 4), **GROUPS, "mode": "std"},
    "majority_vote": {
        "answer_ids": torch.tensor([[0, 1, 1, -1], [2, 2, 0, 0]]),
        **GROUPS,
        "weights": torch.ones(2, 4, dtype=torch.int64),
        "tie_break": torch.eye(2, 4).bool(),
    },
    "iqr_filter": {"entropy": normal(2, 4), **GROUPS, "k": 0.75, "scope": "batch", "two_sided": True},
    "grpo_loss": {"logprob": -normal(T, seed=3).abs(), "entropy": normal(T).abs(), **LOSS},
    "logits_grpo_loss": {"logits": normal(T, V), **ROWS, **LOSS},
    "linear_grpo_loss": {**HEAD, **LOSS},
    "ema_update_": {
        "momentum": [normal(3), normal(2, 2).bfloat16()],
        "policy": [normal(3, seed=1), normal(2, 2, seed=2)],
        "decay": 0.75,
        "rounding": "nearest",
        "compensation": [None, torch.zeros(2, 2, dtype=torch.bfloat16)],
        "publish": [torch.zeros(3), None],
        "seed": 3,
        "step": 2,
        "offsets": [5, 0],
    },
}
LISTS = ("momentum", "policy", "compensation", "publish")
INTEGERS = ("budget_bytes", "seed", "step")
# Where None stands for a default.
OPTIONAL = "mask keep weights tie_break bias group softcap budget_bytes cu_seqlens entropy compensation publish".split()
OPTIONAL += ["old_logprob", "ref_logprob", "rollout_logprob", "dual_clip", "max_length", "normalizer"]
ARGUMENTS = [(op, arg) for op, call in CALLS.items() for arg in call]
NUMBERS = [(op, arg) for op, arg in ARGUMENTS if type(CALLS[op][arg]) in (int, float)]
each_number = pytest.mark.parametrize(("op", "arg"), NUMBERS)


def call(op: str, backend: str, **changes: Any) -> list[Tensor]:
    """The results, and what was written, of a call on fresh tensors."""
    arguments = {
        name: [None if entry is None else entry.clone() for entry in value] if name in LISTS else value
        for name, value in CALLS[op].items()
    }
    given = {name: make(arguments) if callable(make) else make for name, make in changes.items()}
    found = getattr(K, op)(**(arguments | given), backend=backend)
    if op == "ema_update_":
        written = [*arguments["momentum"], *arguments["compensation"], *arguments["publish"]]
        return [entry for entry in written if entry is not None]
    if isinstance(found, K.GrpoLoss):
        return [found.loss, *found.metrics.values()]
    return [found] if isinstance(found, Tensor) else [output for output in found if output is not None]


def same(found: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_every_argument_is_here():
    assert CALLS.keys() == OPERATIONS.keys()
    for op, arguments in CALLS.items():
        assert inspect.signature(getattr(K, op)).parameters.keys() - {"backend"} == arguments.keys(), op


@each_number
@on_each_backend
def test_numbers_of_other_libraries(op, arg, backend):
    value = CALLS[op][arg]
    kinds: list[Callable[[Any], Any]] = [np.int16, np.int64, np.uint8] if isinstance(value, int) else []
    if arg not in INTEGERS:
        kinds += [np.float16, np.float32, np.float64, np.longdouble, fractions.Fraction, float]
    if arg == "budget_bytes":
        kinds = [np.int16, np.int64, np.uint32]
    want = call(op, backend)
    for kind in kinds:
        assert same(call(op, backend, **{arg: kind(value)}), want), kind


@each_number
@on_each_backend
def test_what_is_no_number_there(op, arg, backend):
    wrong = [True, np.True_, "1", b"1", None, 1j, [1.0], np.array(1.0), np.array([1.0]), decimal.Decimal(1), object()]
    wrong += [float("nan"), np.float32("nan"), float("inf"), np.float32("-inf"), np.longdouble("inf"), 10**400, -1e300]
    wrong += [fractions.Fraction(10**400), np.datetime64("now"), torch.nn.Linear(1, 1), print]
    if arg in INTEGERS:
        wrong += [3.0, np.float32(3), fractions.Fraction(3, 1), 2**63, -(2**63) - 1, np.uint64(2**63)]
    for value in wrong:
        if (value is None and arg in OPTIONAL) or (arg == "entropy_coef" and type(value) is float and value == -1e300):
            continue
        with pytest.raises(ValueError, match=MESSAGE.format(op=op, arg=arg)):
            call(op, backend, **{arg: lambda _, value=value: value})


@pytest.mark.parametrize(("op", "arg"), [(op, arg) for op, arg in ARGUMENTS if isinstance(CALLS[op][arg], bool)])
@on_each_backend
def test_flags(op, arg, backend):
    want = call(op, backend)
    assert same(call(op, backend, **{arg: np.bool_(CALLS[op][arg])}), want)
    for value in (1, 0, "yes", None, np.array([True, False]), torch.tensor(True), [], 1.0):
        with pytest.raises(ValueError, match=MESSAGE.format(op=op, arg=arg)):
            call(op, backend, **{arg: value})


@pytest.mark.parametrize("op", CALLS)
def test_names(op):
    for arg in ("backend", *(arg for arg, value in CALLS[op].items() if isinstance(value, str))):
        given = {} if arg == "backend" else {arg: np.str_(CALLS[op][arg])}
        call(op, "reference", **given)
        for value in (
            None,
            0,
            ["cpu"],
            {"std"},
            np.array("mean"),
            np.array(["k1", "k2"]),
            torch.ones(2),
            "nearby",
            b"sum",
        ):
            with pytest.raises(ValueError, match=MESSAGE.format(op=op, arg=arg)):
                getattr(K, op)(**(CALLS[op] | {arg: value}))


@pytest.mark.parametrize(
    ("op", "arg"), [(op, arg) for op, arg in ARGUMENTS if isinstance(CALLS[op][arg], Tensor) or arg == "group"]
)
@on_each_backend
def test_what_is_no_tensor(op, arg, backend):
    array = CALLS[op][arg].numpy() if arg != "group" else "WORLD"
    for value in (array, [1.0], 1.0, np.float32(1), "x", object(), None):
        if value is None and (arg in OPTIONAL or (op, arg) == ("iqr_filter", "keep")):
            continue
        with pytest.raises(ValueError, match=MESSAGE.format(op=op, arg=arg).replace(f"{arg}\\S*", ".*" + arg + ".*")):
            call(op, backend, **{arg: value})


@on_each_backend
@pytest.mark.parametrize("arg", [*LISTS, "offsets"])
def test_lists_are_made_of_what_can_be_walked(arg, backend):
    want = call("ema_update_", backend)
    walks: dict[str, Callable[[list[Any]], Any]] = {
        "tuple": tuple,
        "generator": lambda entries: (entry for entry in entries),
        "iterator": iter,
        "map": lambda entries: map(lambda entry: entry, entries),
        "values": lambda entries: dict(enumerate(entries)).values(),
    }
    for name, walk in walks.items():
        assert same(call("ema_update_", backend, **{arg: lambda given, walk=walk: walk(given[arg])}), want), name


@on_each_backend
@pytest.mark.parametrize("arg", LISTS)
def test_what_is_no_list_of_tensors(arg, backend):
    wrong: list[Callable[[list[Any]], Any]] = [
        lambda entries: torch.ones(2, 3),
        lambda entries: dict(zip("ab", entries, strict=True)),
        set,
        lambda entries: "ab",
        lambda entries: 2,
        lambda entries: torch.nn.Linear(2, 2),
        lambda entries: np.ones(2),
        lambda entries: torch.nn.Linear(2, 2).named_parameters(),
        lambda entries: iter(entries[:1]),
        lambda entries: (each for each in [*entries, None]),
    ]
    for walk in wrong:
        before = [entry.clone() for entry in CALLS["ema_update_"]["momentum"]]
        with pytest.raises(ValueError, match=r"^ema_update_: \w+(\[\d\])? must be .+, got .+\. .+\.$"):
            call("ema_update_", backend, **{arg: lambda given, walk=walk: walk(given[arg])})
        assert same(CALLS["ema_update_"]["momentum"], before)


@on_each_backend
def test_parameters_as_they_come(backend):
    old, new, copy = (torch.nn.Linear(3, 2) for _ in range(3))
    want = [o.lerp(n, 0.25) for o, n in zip(old.parameters(), new.parameters(), strict=True)]
    K.ema_update_(old.parameters(), new.parameters(), np.float32(0.75), publish=copy.parameters(), backend=backend)
    for layer in (old, copy):
        torch.testing.assert_close(list(layer.parameters()), [torch.nn.Parameter(w) for w in want])


def test_numbers_and_generators_under_a_compiler():
    logits, old, new = normal(T, V), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(logits: Tensor, temperature: Any) -> Tensor:
        K.ema_update_(old.parameters(), new.parameters(), 0.5, step=1)
        return K.token_logprob(logits, TARGETS, temperature=temperature).logprob

    for temperature in (0.5, 0.75, 2):
        want = K.token_logprob(logits, TARGETS, temperature=temperature).logprob
        torch.testing.assert_close(run(logits, temperature), want)
