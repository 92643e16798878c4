from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import assert_pass_on
from torch import Tensor

from mgrpo_kernels import backends, ema_update_
from mgrpo_kernels.ema_update import reference
from mgrpo_kernels.ema_update.rounding import philox, random_words, round_stochastically
from mgrpo_kernels.testing import assert_mutants_rejected, assert_within_budget

SHAPES = [(40, 7), (), (33,), (0, 3), (5, 4, 3)]
BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16
# torch.lerp fuses its product and sum where the processor can, as the library does but for its portable build.
REFERENCE_FUSES = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
BITS_ARE_EQUAL = REFERENCE_FUSES and "portable" not in backends()["cpu"].reason
# Older versions of Triton's interpreter round the product of a fused multiply-add.
TRITON_BITS_ARE_EQUAL = REFERENCE_FUSES and tuple(map(int, version("triton").split(".")[:2])) >= (3, 9)


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request) -> str:
    return request.param


def make_lists(
    momentum_dtype: torch.dtype = FP32, policy_dtype: torch.dtype = FP32
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    pairs = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(2)]
    return [x.to(momentum_dtype) for x in pairs[0]], [x.to(policy_dtype) for x in pairs[1]]


def functional(momentum, policy, decay, **kwargs) -> tuple[Tensor, ...]:
    """The new momentum, so that a mutant can spoil it."""
    copies = [tensor.clone() for tensor in momentum]
    ema_update_(copies, policy, decay, **kwargs)
    return tuple(copies)


class Result(tuple):
    def __new__(cls, *tensors):
        return super().__new__(cls, tensors)


def check(op) -> None:
    for momentum_dtype in (FP32, BF16, FP16):
        for policy_dtype in (FP32, BF16, FP16):
            momentum, policy = make_lists(momentum_dtype, policy_dtype)
            for decay in (0.99, 0.3, torch.tensor(0.75)):
                share = float(decay)
                for actual, old, new in zip(op(momentum, policy, decay), momentum, policy, strict=True):
                    assert actual.dtype == momentum_dtype
                    exact = share * old.double() + (1 - share) * new.double()
                    rounded = (share * old.float() + (1 - share) * new.float()).to(momentum_dtype)
                    if actual.numel():
                        assert_within_budget(actual, exact, rounded, reduction_length=2)


def test_matches_fp64_and_rejects_every_mutant(backend):
    def op(*args, **kwargs):
        return Result(*functional(*args, **kwargs, backend=backend))

    def wrong_decay(op):
        return lambda momentum, policy, decay: op(momentum, policy, decay * 0.999)

    without = ("dropped_mask", "wrong_temperature")
    assert_mutants_rejected(op, check, extra={"wrong_decay": wrong_decay}, without=without)


def test_closed_form_after_many_steps(backend):
    momentum, policy = make_lists()
    start = [tensor.clone() for tensor in momentum]
    for _ in range(50):
        ema_update_(momentum, policy, 0.95, backend=backend)
    for now, first, target in zip(momentum, start, policy, strict=True):
        torch.testing.assert_close(now, target + 0.95**50 * (first - target))


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(dtype, backend) for dtype in (FP32, BF16) for backend in ("reference", "cpu", "triton")]
    + [(torch.float64, "auto")],
)
def test_decay_0_and_1_are_exact(dtype, backend, rounding, as_tensor):
    def exact(decay: float) -> float | Tensor:
        return torch.tensor(decay) if as_tensor else decay

    momentum, policy = make_lists(dtype, dtype)
    policy[0][0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    frozen = functional(momentum, policy, exact(1.0), rounding=rounding, backend=backend)
    momentum[0][0, 3:6] = policy[0][0, :3]
    policy[0][0, 2] = 1.0
    copied = functional(momentum, policy, exact(0.0), rounding=rounding, backend=backend)
    momentum[0][0, 3:6] = frozen[0][0, 3:6]
    assert all(torch.equal(now, old) for now, old in zip(frozen, momentum, strict=True))
    assert all(torch.equal(now, new) for now, new in zip(copied, policy, strict=True))


def test_equal_weights_stay_as_they_are(backend):
    momentum, _ = make_lists()
    now = functional(momentum, [tensor.clone() for tensor in momentum], 0.9, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(now, momentum, strict=True))


def test_plain_bf16_stalls_while_stochastic_and_compensated_do_not(backend):
    update_ = partial(ema_update_, backend=backend)
    # Triton's interpreter is slow.
    old, new, steps, decay = 1.0, 1.25, 20 if backend == "triton" else 200, 0.999
    target = new + decay**steps * (old - new)
    policy = [torch.full((4000,), new)]
    plain, stochastic, compensated = ([torch.full((4000,), old, dtype=BF16)] for _ in range(3))
    terms = [torch.zeros(4000, dtype=BF16)]
    for step in range(steps):
        update_(plain, policy, decay)
        update_(stochastic, policy, decay, rounding="stochastic", seed=11, step=step)
        update_(compensated, policy, decay, compensation=terms)
    assert torch.equal(plain[0], torch.full_like(plain[0], old))
    # A bf16 step at 1 is 2^-7; n roundings, averaged over 4,000 elements, stray by about 2^-7 sqrt(n / 4000).
    assert abs(float(stochastic[0].double().mean()) - target) < 4 * 2**-7 * math.sqrt(steps / 4000)
    torch.testing.assert_close(
        compensated[0].float() + terms[0].float(), torch.full((4000,), target), rtol=2e-4, atol=0
    )
    assert float(compensated[0].float().sub(target).abs().max()) <= 2**-8


def test_philox_gives_the_published_words():
    def words(*values: int) -> tuple[Tensor, ...]:
        return tuple(torch.tensor([value]) for value in values)

    zeros = philox(words(0, 0, 0, 0), words(0, 0))
    assert [f"{int(word):08x}" for word in zeros] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    full = philox(words(*[0xFFFFFFFF] * 4), words(*[0xFFFFFFFF] * 2))
    assert [f"{int(word):08x}" for word in full] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


def test_random_words_depend_on_seed_step_tensor_and_element_alone(monkeypatch):
    seed, step = torch.tensor(2**62 + 12345), torch.tensor(7)
    words = random_words(0, 1003, seed, step, 2)
    assert torch.equal(random_words(400, 603, seed, step, 2), words[400:])
    single = philox(tuple(torch.tensor([v]) for v in (25, 0, 7, 2)), (seed & 0xFFFFFFFF, seed >> 32))
    assert words[100:104].tolist() == [int(word) for word in single]
    for other in (
        random_words(0, 1003, seed + 1, step, 2),
        random_words(0, 1003, seed, step + 1, 2),
        random_words(0, 1003, seed, step, 3),
    ):
        assert (other != words).float().mean() > 0.99
    assert len(words.unique()) > 1000
    momentum, policy = make_lists(BF16)
    whole = functional(momentum, policy, 0.9, rounding="stochastic", seed=3, step=torch.tensor(4))
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 8)
    blocks = functional(momentum, policy, 0.9, rounding="stochastic", seed=3, step=4)
    assert all(torch.equal(one, other) for one, other in zip(whole, blocks, strict=True))
    other = functional(momentum, policy, 0.9, rounding="stochastic", seed=3, step=5)
    assert not torch.equal(whole[0], other[0])


def test_stochastic_rounding_is_fair_and_keeps_what_bf16_holds():
    value = -(1 + 0.3 * 2**-7)
    words = random_words(0, 100_000, torch.tensor(1), torch.tensor(0), 0)
    rounded = round_stochastically(torch.full((100_000,), value), words).double()
    assert set(rounded.tolist()) == {-1.0, -(1 + 2**-7)}
    assert abs(float(rounded.mean()) - value) < 5 * 2**-7 * math.sqrt(0.21 / 100_000)
    special = torch.tensor([0.0, -0.0, 1.5, torch.inf, -torch.inf, torch.nan, 2.0**-133])
    assert torch.equal(round_stochastically(special, torch.full((7,), 0xFFFF))[:5], special[:5].bfloat16())
    largest_nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(FP32)
    assert round_stochastically(torch.cat([special[5:6], largest_nan]), torch.full((2,), 0xFFFF)).isnan().all()


def test_publish_receives_the_new_momentum_in_its_own_dtype(backend):
    momentum, policy = make_lists()
    publish = [torch.zeros(shape, dtype=BF16) for shape in SHAPES]
    publish[2] = None
    ema_update_(momentum, policy, 0.9, publish=publish, backend=backend)
    expected = functional(*make_lists(), 0.9, backend=backend)
    for now, copy, want in zip(momentum, publish, expected, strict=True):
        assert torch.equal(now, want)
        assert copy is None or torch.equal(copy, want.bfloat16())
    frozen = [torch.full(shape, torch.nan) for shape in SHAPES]
    ema_update_(momentum, policy, 1.0, publish=frozen, backend=backend)
    assert all(torch.equal(copy, want) for copy, want in zip(frozen, expected, strict=True))


def test_mixed_lists_tied_policies_and_parameters():
    shared = torch.nn.Parameter(torch.ones(6))
    momentum = [torch.nn.Parameter(torch.zeros(6)), torch.zeros(6, dtype=BF16), torch.zeros(6, dtype=torch.float64)]
    terms = [None, torch.zeros(6, dtype=BF16), None]
    ema_update_(momentum, [shared, shared, shared], 0.75, compensation=terms)
    for tensor in momentum:
        assert torch.equal(tensor.detach().double(), torch.full((6,), 0.25, dtype=torch.float64))
    assert momentum[0].requires_grad and momentum[0].is_leaf
    for backend in ("auto", "reference", "cpu", "triton"):
        ema_update_([], [], 0.5, backend=backend)
        ema_update_([torch.zeros(0), torch.zeros(2, 0)], [torch.zeros(0), torch.zeros(2, 0)], 0.5, backend=backend)


def test_halves_of_one_buffer_are_no_alias(backend):
    flat = torch.zeros(8)
    ema_update_([flat[:4], flat[4:]], [torch.ones(4), torch.full((4,), 2.0)], 0.5, backend=backend)
    assert flat.tolist() == [0.5] * 4 + [1.0] * 4


class Case:
    """Lists of tensors at odd offsets into buffers of NaN, so that what is written beside them shows."""

    def __init__(self, sizes, momentum_dtypes, policy_dtype, publish_dtypes, mode, seed):
        generator = torch.Generator().manual_seed(seed)

        def views(values: list[Tensor], dtypes: list[torch.dtype]) -> tuple[list[Tensor], list[Tensor]]:
            buffers = [
                torch.full((value.numel() + 5,), torch.nan, dtype=d) for value, d in zip(values, dtypes, strict=True)
            ]
            tensors = [buffer[3:-2] for buffer in buffers]
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
            return buffers, tensors

        olds, news, smalls = ([torch.randn(size, generator=generator) for size in sizes] for _ in range(3))
        momentum_dtypes = [momentum_dtypes[i % len(momentum_dtypes)] for i in range(len(sizes))]
        self.buffers, self.momentum = views(olds, momentum_dtypes)
        self.policy = views(news, [policy_dtype] * len(sizes))[1]
        self.options: dict[str, Any] = {
            "rounding": "stochastic" if mode == "stochastic" else "nearest",
            "seed": -seed,
            "step": seed,
        }
        if mode == "compensated":
            buffers, terms = views([small * 1e-3 for small in smalls], [BF16] * len(sizes))
            self.buffers += buffers
            self.options["compensation"] = [
                term if dtype == BF16 else None for term, dtype in zip(terms, momentum_dtypes, strict=True)
            ]
        dtypes = [publish_dtypes[i % len(publish_dtypes)] for i in range(len(sizes))]
        buffers, copies = views([small * torch.nan for small in smalls], [dtype or FP32 for dtype in dtypes])
        self.buffers += buffers
        self.options["publish"] = [copy if dtype else None for copy, dtype in zip(copies, dtypes, strict=True)]

    def run(self, decay: float | Tensor, backend: str) -> list[Tensor]:
        ema_update_(self.momentum, self.policy, decay, **self.options, backend=backend)
        return self.buffers


DTYPES = [FP32, BF16, FP16]
CASES = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(0, 200), min_size=1, max_size=6),
        "policy_dtype": st.sampled_from(DTYPES),
        "publish_dtypes": st.lists(st.sampled_from([*DTYPES, None]), min_size=1, max_size=3),
        "seed": st.integers(0, 2**40),
    }
)
MODES = st.sampled_from(["nearest", "compensated", "stochastic"])


@settings(max_examples=60, deadline=None)
@given(
    case=CASES, mode=MODES, momentum_dtypes=st.permutations(DTYPES), decay=st.sampled_from([0.0, 0.3, 0.5, 0.99, 1.0])
)
def test_cpu_agrees_with_fp64_and_with_the_reference(case, mode, momentum_dtypes, decay):
    assert_agrees("cpu", case, mode, momentum_dtypes, decay, BITS_ARE_EQUAL)


@settings(max_examples=25, deadline=None)
@given(
    case=CASES,
    mode=MODES,
    momentum_dtypes=st.permutations(DTYPES),
    decay=st.sampled_from([0.0, 0.3, 0.5, 0.99, 1.0]),
    as_tensor=st.booleans(),
)
def test_triton_agrees_with_fp64_and_with_the_reference(case, mode, momentum_dtypes, decay, as_tensor):
    decay = torch.tensor(decay, dtype=torch.float64) if as_tensor else decay
    assert_agrees("triton", case, mode, momentum_dtypes, decay, TRITON_BITS_ARE_EQUAL)


def assert_agrees(backend, case, mode, momentum_dtypes, decay, bits_are_equal):
    dtypes = [dtype for dtype in momentum_dtypes if mode != "stochastic" or dtype != FP16]
    one, other, start = (Case(**case, momentum_dtypes=dtypes, mode=mode) for _ in range(3))
    one.run(decay, backend)
    decay = float(decay)
    other.run(decay, "reference")
    for actual, expected in zip(one.buffers, other.buffers, strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
        if bits_are_equal or decay in (0.0, 1.0):
            assert torch.equal(actual.nan_to_num(), expected.nan_to_num())
    terms = start.options.get("compensation", [None] * len(start.momentum))
    for actual, expected, old, new, term in zip(
        one.momentum, other.momentum, start.momentum, start.policy, terms, strict=True
    ):
        if actual.numel():
            whole = old.double() if term is None else old.double() + term.double()
            exact = (whole if decay < 1 else old.double()).lerp(new.double(), 1 - decay)
            assert_within_budget(actual, exact, expected, reduction_length=2)


@pytest.mark.parametrize("mode", ["nearest", "compensated", "stochastic"])
def test_bits_do_not_depend_on_threads_nor_on_how_the_list_is_cut(mode):
    sizes = [70_001, 3, 0, 131_072, 64, 200_000]
    options = {"policy_dtype": FP32, "publish_dtypes": [BF16], "mode": mode, "seed": 3, "momentum_dtypes": [BF16]}
    cases = [Case(sizes, **options) for _ in range(3)]
    threads = torch.get_num_threads()
    try:
        for case, num in zip(cases, (1, 2, 5), strict=True):
            torch.set_num_threads(num)
            case.run(0.9, "cpu")
    finally:
        torch.set_num_threads(threads)
    for case in cases[1:]:
        for one, other in zip(case.buffers, cases[0].buffers, strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num())
    if mode != "stochastic":
        alone = Case(sizes, **options)
        for i, (old, new, copy) in enumerate(zip(alone.momentum, alone.policy, alone.options["publish"], strict=True)):
            term = None if mode == "nearest" else [alone.options["compensation"][i]]
            ema_update_([old], [new], 0.9, publish=[copy], compensation=term, backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(alone.momentum, cases[0].momentum, strict=True))


def test_triton_updates_whole_blocks_as_their_elements_one_by_one():
    # An address that is no multiple of 16 takes the masked path, for every element.
    for mode in ("nearest", "compensated", "stochastic"):
        dtypes = {"momentum_dtypes": [BF16, FP32], "policy_dtype": BF16, "publish_dtypes": [None, BF16]}
        case = Case([5000, 4096], **dtypes, mode=mode, seed=6)
        lists = [case.momentum, case.policy, case.options["publish"], case.options.get("compensation", [None, None])]
        assert any(tensor.data_ptr() % 16 for tensor in case.momentum)
        aligned = [[None if tensor is None else tensor.clone() for tensor in tensors] for tensors in lists]
        assert not any(tensor.data_ptr() % 16 for tensor in aligned[0])
        case.run(0.9, "triton")
        options = {name: case.options[name] for name in ("rounding", "seed", "step")}
        terms = aligned[3] if mode == "compensated" else None
        ema_update_(*aligned[:2], 0.9, publish=aligned[2], compensation=terms, **options, backend="triton")
        for one, other in zip([*aligned[0], *aligned[2], *aligned[3]], [*lists[0], *lists[2], *lists[3]], strict=True):
            assert one is None or torch.equal(one, other)


def test_triton_spans_of_several_blocks_change_nothing(monkeypatch):
    triton = importlib.import_module("mgrpo_kernels.ema_update.triton")
    cases = [Case([9000, 3, 2048], [BF16], FP32, [FP32], "stochastic", 8) for _ in range(2)]
    monkeypatch.setattr(triton, "_ENOUGH_PROGRAMS", 2)
    for case, most in zip(cases, (1, 3), strict=True):
        monkeypatch.setattr(triton, "_MOST_BLOCKS", most)
        triton._tables.clear()
        case.run(0.9, "triton")
    assert {table.span for table in triton._tables.values()} == {3 * 2048}
    for one, other in zip(*(case.buffers for case in cases), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_triton_keeps_few_tables_and_never_a_wrong_one():
    triton = importlib.import_module("mgrpo_kernels.ema_update.triton")
    triton._tables.clear()
    kept = torch.zeros(40)
    for index in range(2 * triton._MOST_TABLES):
        ema_update_([kept[index : index + 1]], [torch.ones(1)], 0.5, backend="triton")
    assert len(triton._tables) == triton._MOST_TABLES
    flat = kept[:4]
    ema_update_([flat.view(torch.bfloat16)], [torch.ones(8)], 0.0, backend="triton")
    assert torch.equal(flat.view(torch.bfloat16), torch.ones(8, dtype=BF16))


@pytest.mark.parametrize(
    ("count", "backend"), [(1, "cpu"), (31, "cpu"), (64, "cpu"), (70_000, "cpu"), (1, "triton"), (2500, "triton")]
)
def test_random_bits_are_those_of_the_specification(count, backend):
    # At decay 0 the value to be rounded is the policy itself, on any processor.
    policy = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (5, count)]
    for seed, step in ((0, 0), (-(2**63), 2**40 + 17), (2**63 - 1, torch.tensor(2**31 - 1, dtype=torch.int32))):
        momentum = [torch.zeros_like(tensor, dtype=BF16) for tensor in policy]
        ema_update_(momentum, policy, 0.0, rounding="stochastic", seed=seed, step=step, backend=backend)
        for index, (now, values) in enumerate(zip(momentum, policy, strict=True)):
            words = random_words(0, values.numel(), torch.tensor(seed), torch.as_tensor(step).long(), index)
            assert torch.equal(now, round_stochastically(values, words))


# Each place of a counter's four words, counters above 32 bits, one that passes them within a block, and the largest.
OFFSETS = [0, 1, 2, 3, 4, 7, 2**34 - 5, 2**34 - 1030, 2**62 + 1, 2**63 - 1]


def update_at(backend: str, momentum: list[Tensor], policy: list[Tensor], offsets: list[int], step: int) -> None:
    options = {"rounding": "stochastic", "seed": 2**40 + 3, "step": step}
    ema_update_(momentum, policy, 0.0, **options, offsets=offsets, backend=backend)


def check_offsets(update: Callable[[list[Tensor], list[Tensor], list[int], int], None], count: int) -> None:
    """At decay 0 the policy is rounded, by words computed here one counter an element; again at other offsets."""
    generator = torch.Generator().manual_seed(count)
    policy = [torch.randn(count, generator=generator) for _ in OFFSETS]
    momentum = [torch.zeros(count, dtype=BF16) for _ in OFFSETS]
    key = (torch.tensor(3), torch.tensor(2**8))
    for step, offsets in enumerate((OFFSETS, OFFSETS[::-1])):
        update(momentum, policy, offsets, step)
        for index, (now, values, offset) in enumerate(zip(momentum, policy, offsets, strict=True)):
            elements = range(offset, offset + count)
            quads = torch.tensor([element // 4 for element in elements])
            others = (torch.full_like(quads, step), torch.full_like(quads, index))
            words = torch.stack(philox((quads & 0xFFFFFFFF, quads >> 32, *others), key))
            own = words[torch.tensor([element % 4 for element in elements]), torch.arange(count)]
            assert torch.equal(now, round_stochastically(values, own)), f"offset {offset}"


# Triton: two whole blocks, four masked ones and a part of one; the others: a part of a vector, some, and two threads.
@pytest.mark.parametrize(
    ("count", "backend"),
    [(3, "reference"), (301, "reference"), (1, "cpu"), (301, "cpu"), (9001, "cpu"), (2900, "triton")],
)
def test_offsets_move_the_random_bits_of_shards(count, backend):
    check_offsets(partial(update_at, backend), count)


@pytest.mark.parametrize(
    "wrong", [lambda at: 0, lambda at: at // 4 * 4, lambda at: at + 1, lambda at: at % 2**34, lambda at: at & ~(2**62)]
)
def test_every_mutant_of_offsets_is_rejected(wrong):
    def update(momentum: list[Tensor], policy: list[Tensor], offsets: list[int], step: int) -> None:
        update_at("cpu", momentum, policy, [wrong(offset) % 2**63 for offset in offsets], step)

    with pytest.raises(AssertionError, match="offset"):
        check_offsets(update, 301)


@st.composite
def cut_tensors(draw) -> list[list[int]]:
    """For each of some tensors where its three shards begin, and its size."""
    sizes = draw(st.lists(st.integers(0, 300), min_size=1, max_size=4))
    return [[0, *sorted(draw(st.integers(0, size)) for _ in range(2)), size] for size in sizes]


def update_shards(whole: Case, cuts: list[list[int]], decay: float, backend: str) -> None:
    """Each rank's call on its shards."""
    lists = {"momentum": whole.momentum, "policy": whole.policy, "publish": whole.options["publish"]}
    for rank in range(3):
        shards: dict[str, Any] = {
            name: [t if t is None else t[c[rank] : c[rank + 1]] for t, c in zip(tensors, cuts, strict=True)]
            for name, tensors in lists.items()
        }
        offsets = np.array([cut[rank] for cut in cuts])
        ema_update_(**(whole.options | shards), decay=decay, offsets=offsets, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@settings(max_examples=20, deadline=None)
@given(cuts=cut_tensors(), seed=st.integers(0, 2**40), publish=st.sampled_from([BF16, None]))
def test_shards_round_as_the_whole(backend, cuts, seed, publish):
    sizes = [cut[-1] for cut in cuts]
    whole, parts = (Case(sizes, [BF16, FP32], BF16, [publish], "stochastic", seed) for _ in range(2))
    whole.run(0.9, backend)
    update_shards(parts, cuts, 0.9, backend)
    for one, other in zip(whole.buffers, parts.buffers, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_shards_of_many_spans_round_as_the_whole_on_any_thread_count():
    cuts = [[0, 65_537, 65_537, 70_001], [0, 1, 131_070, 200_003], [0, 0, 0, 5]]
    whole, *parts = (Case([cut[-1] for cut in cuts], [BF16], FP32, [BF16], "stochastic", 5) for _ in range(3))
    whole.run(0.9, "cpu")
    threads = torch.get_num_threads()
    try:
        for part, num in zip(parts, (1, 2), strict=True):
            torch.set_num_threads(num)
            update_shards(part, cuts, 0.9, "cpu")
            for one, other in zip(whole.buffers, part.buffers, strict=True):
                assert torch.equal(one.nan_to_num(), other.nan_to_num())
    finally:
        torch.set_num_threads(threads)


def test_offsets_are_any_integers_and_change_no_other_rounding(backend):
    momentum, policy = make_lists(BF16)
    update = partial(functional, momentum, policy, 0.9, backend=backend)
    plain = update()
    for offsets in ([5] * 5, range(5), np.arange(5, dtype=np.uint8), (np.int32(7) for _ in range(5))):
        assert all(map(torch.equal, update(offsets=offsets), plain))
    stochastic = update(rounding="stochastic")
    assert all(map(torch.equal, update(rounding="stochastic", offsets=[0] * 5), stochastic))
    shifted = update(rounding="stochastic", offsets=(np.int32(7) for _ in range(5)))
    assert not torch.equal(shifted[0], stochastic[0])


def test_not_a_number_and_infinity_survive_every_rounding(backend):
    signalling = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(FP32)
    special = torch.cat([signalling, torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 3.4e38])])
    for decay in (0.0, 0.9):
        for dtype in (FP32, BF16, FP16):
            for rounding in ("nearest",) if dtype == FP16 else ("nearest", "stochastic"):
                now = torch.ones(8, dtype=dtype)
                ema_update_([now], [special], decay, rounding=rounding, backend=backend)
                assert now[:4].isnan().all() and now[4:6].tolist() == [torch.inf, -torch.inf]
                assert decay or (now[6] == 0 and torch.signbit(now[6]))


def test_fp64_anywhere_is_for_the_reference():
    wide = torch.zeros(2, dtype=torch.float64)
    for momentum, policy, publish in ((wide, torch.ones(2), None), (M, P.double(), None), (M, P, [P.double()])):
        arguments = ([momentum.clone()], [policy], 0.5)
        ema_update_(*arguments, publish=publish)
        assert arguments[0][0].tolist() == [0.5] * len(policy)
        with pytest.raises(ValueError, match=r"backend must be a backend for .*float64.*, got 'cpu'"):
            ema_update_(*arguments, publish=publish, backend="cpu")


def test_what_is_written_is_seen_by_autograd(backend):
    momentum, policy = make_lists(BF16)
    terms = [torch.zeros_like(tensor) for tensor in momentum]
    publish = [torch.zeros_like(tensor) for tensor in momentum]
    written, before = [*momentum, *terms, *publish], []
    before = [tensor._version for tensor in written]
    ema_update_(momentum, policy, 0.9, compensation=terms, publish=publish, backend=backend)
    assert all(tensor._version > version for tensor, version in zip(written, before, strict=True))
    weight = torch.ones(3, requires_grad=True)
    product = (weight * M[:3]).sum()
    ema_update_([M[:3]], [torch.zeros(3)], 0.5, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_decay_out_of_range_gives_nan_where_values_are_not_read(backend):
    for decay in (1.5, -0.1, math.nan):
        now = torch.ones(20)
        torch.ops.mgrpo_kernels.ema_update_(
            [now], [torch.ones(20)], [], [], [], [], 0.0, torch.tensor(decay), False, 0, 0, None, [], backend
        )
        assert now.isnan().all()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_agrees(isa):
    assert_pass_on(
        isa,
        __file__,
        "(mutant or agrees_with or specification or survive or exact or (shards and cpu)) and not reference-",
    )


def test_opcheck_and_meta():
    op = torch.ops.mgrpo_kernels.ema_update_
    momentum, policy = make_lists(BF16)
    terms, copies = ([torch.zeros_like(momentum[index]) for index in (0, 2)] for _ in range(2))
    scalars = (0.9, None, False, 1, 2, None, [], "cpu")
    torch.library.opcheck(op, (momentum, policy, terms, [0, 2], copies, [0, 2], *scalars))
    on_device = (0.0, torch.tensor(0.9), True, 1, 0, torch.tensor(3), [4, 0, 1, 0, 2**63 - 1], "cpu")
    torch.library.opcheck(op, (momentum, policy, [], [], copies, [0, 2], *on_device))
    for backend in ("auto", "cpu", "triton"):
        lists = [[tensor.to("meta") for tensor in tensors] for tensors in (momentum, policy, momentum)]
        ema_update_(lists[0], lists[1], 0.9, publish=lists[2], backend=backend)
        ema_update_(lists[0], lists[1], 0.9, rounding="stochastic", offsets=range(5), backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["nearest", "compensated", "stochastic"])
def test_compiles_whole(mode):
    options = {"policy_dtype": BF16, "publish_dtypes": [BF16, None], "mode": mode, "seed": 4}
    eager, traced = (Case([33, 0, 7], [BF16, FP32], **options) for _ in range(2))

    def run(case: Case, decay: Tensor, step: Tensor) -> None:
        case.options |= {"step": step, "offsets": [5, 0, 2**40]}
        case.run(decay, "cpu")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for decay, step in ((0.9, 0), (0.5, 1)):
        run(eager, torch.tensor(decay), torch.tensor(step))
        compiled(traced, torch.tensor(decay), torch.tensor(step))
    for one, other in zip(eager.buffers, traced.buffers, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


M, P = torch.zeros(4), torch.ones(4)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("policy must be of length 1, got 2", {"policy": [P, P]}),
        ("publish must be of length 1, got 0", {"publish": []}),
        ("compensation must be of length 1", {"compensation": [None, None]}),
        (r"policy\[0\] must be of shape .* = \[4\], got \[3\]", {"policy": [P[:3]]}),
        (r"policy\[0\] must be of dtype", {"policy": [P.int()]}),
        (r"policy\[0\] must be on cpu", {"policy": [P.to("meta")]}),
        (r"momentum\[0\] must be of dtype", {"momentum": [M.long()]}),
        (r"momentum\[0\] must be a tensor", {"momentum": [1.0]}),
        (r"momentum\[0\] must be contiguous", {"momentum": [torch.zeros(8)[::2]]}),
        (r"publish\[0\] must be of shape", {"publish": [torch.zeros(2, 2)]}),
        (r"compensation\[0\] must be of dtype bfloat16", {"compensation": [torch.zeros(4)]}),
        (r"momentum\[0\] must be bf16 where compensated", {"compensation": [torch.zeros(4, dtype=BF16)]}),
        ("compensation must be None with stochastic", {"compensation": [None], "rounding": "stochastic"}),
        (r"momentum\[0\] must be bf16 or wider", {"momentum": [M.half()], "rounding": "stochastic"}),
        ("rounding must be one of", {"rounding": "up"}),
        (r"decay must be a finite number in \[0, 1\], got 1.5", {"decay": 1.5}),
        ("decay must be a finite number", {"decay": float("nan")}),
        ("decay must be a finite number", {"decay": torch.tensor(-0.5)}),
        (r"decay must be of shape \[\]", {"decay": torch.tensor([0.5])}),
        ("seed must be an int of 64 bits", {"seed": 2**63}),
        ("step must be >= 0", {"step": -1}),
        ("offsets must be of length 1, got 2", {"offsets": [0, 0]}),
        ("offsets must be a list of integers, got Tensor", {"offsets": torch.tensor([0])}),
        (r"offsets\[0\] must be >= 0 and an int of 64 bits, got -1", {"offsets": [-1]}),
        (r"offsets\[0\] must be >= 0 and an int of 64 bits", {"offsets": [2**63]}),
        (r"offsets\[0\] must be >= 0 and an int of 64 bits", {"offsets": np.array([1.0])}),
        (r"offsets\[0\] must be >= 0 and an int of 64 bits, got None", {"offsets": [None]}),
        ("step must be of dtype int32 or int64", {"step": torch.tensor(0.5)}),
        ("backend must be one of", {"backend": "none"}),
    ],
)
def test_wrong_arguments_are_refused(message, arguments):
    with pytest.raises(ValueError, match=f"^ema_update_: {message}"):
        ema_update_(**({"momentum": [M], "policy": [P], "decay": 0.9} | arguments))


@pytest.mark.parametrize(
    ("momentum", "policy", "publish"),
    [
        ([M, M], [P, P], None),
        ([M[:3], M[1:]], [P[:3], P[1:]], None),
        ([M], [M], None),
        ([M], [P], [M]),
        ([M], [P], [P]),
        ([M, torch.zeros(4)], [P, P], [torch.zeros(4)] * 2),
    ],
)
def test_shared_memory_is_refused(momentum, policy, publish):
    with pytest.raises(ValueError, match=r"^ema_update_: \S+ must be apart from \S+, got shared memory"):
        ema_update_(momentum, policy, 0.5, publish=publish)
    assert torch.equal(M, torch.zeros(4)) and torch.equal(P, torch.ones(4))
