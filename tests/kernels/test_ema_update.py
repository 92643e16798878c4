from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mgrpo_kernels import ema_update_
from mgrpo_kernels.ema_update import reference
from mgrpo_kernels.ema_update.rounding import philox, random_words, round_stochastically
from mgrpo_kernels.testing import assert_mutants_rejected, assert_within_budget

SHAPES = [(40, 7), (), (33,), (0, 3), (5, 4, 3)]
BF16, FP32 = torch.bfloat16, torch.float32


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
    for momentum_dtype in (FP32, BF16, torch.float16):
        for policy_dtype in (FP32, BF16):
            momentum, policy = make_lists(momentum_dtype, policy_dtype)
            for decay in (0.99, 0.3, torch.tensor(0.75)):
                share = float(decay)
                for actual, old, new in zip(op(momentum, policy, decay), momentum, policy, strict=True):
                    assert actual.dtype == momentum_dtype
                    exact = share * old.double() + (1 - share) * new.double()
                    rounded = (share * old.float() + (1 - share) * new.float()).to(momentum_dtype)
                    if actual.numel():
                        assert_within_budget(actual, exact, rounded, reduction_length=2)


def test_matches_fp64_and_rejects_every_mutant():
    def op(*args, **kwargs):
        return Result(*functional(*args, **kwargs))

    def wrong_decay(op):
        return lambda momentum, policy, decay: op(momentum, policy, decay * 0.999)

    without = ("dropped_mask", "wrong_temperature")
    assert_mutants_rejected(op, check, extra={"wrong_decay": wrong_decay}, without=without)


def test_closed_form_after_many_steps():
    momentum, policy = make_lists()
    start = [tensor.clone() for tensor in momentum]
    for _ in range(50):
        ema_update_(momentum, policy, 0.95)
    for now, first, target in zip(momentum, start, policy, strict=True):
        torch.testing.assert_close(now, target + 0.95**50 * (first - target))


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float64])
def test_decay_0_and_1_are_exact(dtype, rounding, as_tensor):
    def exact(decay: float) -> float | Tensor:
        return torch.tensor(decay) if as_tensor else decay

    momentum, policy = make_lists(dtype, dtype)
    policy[0][0, 0] = torch.inf
    frozen = functional(momentum, policy, exact(1.0), rounding=rounding)
    copied = functional(momentum, policy, exact(0.0), rounding=rounding)
    assert all(torch.equal(now, old) for now, old in zip(frozen, momentum, strict=True))
    assert all(torch.equal(now, new) for now, new in zip(copied, policy, strict=True))


def test_equal_weights_stay_as_they_are():
    momentum, _ = make_lists()
    now = functional(momentum, [tensor.clone() for tensor in momentum], 0.9)
    assert all(torch.equal(one, other) for one, other in zip(now, momentum, strict=True))


def test_plain_bf16_stalls_while_stochastic_and_compensated_do_not():
    old, new, steps, decay = 1.0, 1.25, 200, 0.999
    target = new + decay**steps * (old - new)
    policy = [torch.full((4000,), new)]
    plain, stochastic, compensated = ([torch.full((4000,), old, dtype=BF16)] for _ in range(3))
    terms = [torch.zeros(4000, dtype=BF16)]
    for step in range(steps):
        ema_update_(plain, policy, decay)
        ema_update_(stochastic, policy, decay, rounding="stochastic", seed=11, step=step)
        ema_update_(compensated, policy, decay, compensation=terms)
    assert torch.equal(plain[0], torch.full_like(plain[0], old))
    # A bf16 step at 1 is 2^-7; 200 roundings, averaged over 4,000 elements, stray by about 2^-7 sqrt(200 / 4000).
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


def test_publish_receives_the_new_momentum_in_its_own_dtype():
    momentum, policy = make_lists()
    publish = [torch.zeros(shape, dtype=BF16) for shape in SHAPES]
    publish[2] = None
    ema_update_(momentum, policy, 0.9, publish=publish)
    expected = functional(*make_lists(), 0.9)
    for now, copy, want in zip(momentum, publish, expected, strict=True):
        assert torch.equal(now, want)
        assert copy is None or torch.equal(copy, want.bfloat16())
    frozen = [torch.full(shape, torch.nan) for shape in SHAPES]
    ema_update_(momentum, policy, 1.0, publish=frozen)
    assert all(torch.equal(copy, want) for copy, want in zip(frozen, expected, strict=True))


def test_mixed_lists_tied_policies_and_parameters():
    shared = torch.nn.Parameter(torch.ones(6))
    momentum = [torch.nn.Parameter(torch.zeros(6)), torch.zeros(6, dtype=BF16), torch.zeros(6, dtype=torch.float64)]
    terms = [None, torch.zeros(6, dtype=BF16), None]
    ema_update_(momentum, [shared, shared, shared], 0.75, compensation=terms)
    for tensor in momentum:
        assert torch.equal(tensor.detach().double(), torch.full((6,), 0.25, dtype=torch.float64))
    assert momentum[0].requires_grad and momentum[0].is_leaf
    ema_update_([], [], 0.5)


def test_halves_of_one_buffer_are_no_alias():
    flat = torch.zeros(8)
    ema_update_([flat[:4], flat[4:]], [torch.ones(4), torch.full((4,), 2.0)], 0.5)
    assert flat.tolist() == [0.5] * 4 + [1.0] * 4


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
