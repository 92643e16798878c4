"""The momentum model: rates, storage modes, tied weights, saving."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import same_bits, snapshot, tiny_model

from mgrpo.config import KernelsConfig, MomentumConfig
from mgrpo.models.momentum import Momentum, decay_at
from mgrpo_kernels.testing import assert_within_budget

MODES = ("fp32", "bf16-stochastic", "bf16-kahan")


class Policy(torch.nn.Module):
    """A matrix, a vector and a buffer."""

    def __init__(self, size: int = 64):
        super().__init__()
        g = torch.Generator().manual_seed(size)
        self.matrix = torch.nn.Parameter(torch.randn(size, 8, generator=g))
        self.vector = torch.nn.Parameter(torch.randn(8, generator=g))
        self.register_buffer("scale", torch.tensor([1.5]))


def momentum_of(policy: torch.nn.Module, **config: object) -> Momentum:
    return Momentum(policy, MomentumConfig(**config), seed=3, kernels=KernelsConfig())


@torch.no_grad()
def move(policy: torch.nn.Module, seed: int) -> None:
    """Adds noise to every weight, as an optimiser step would."""
    g = torch.Generator().manual_seed(seed)
    for weight in policy.parameters():
        weight += torch.randn(weight.shape, generator=g)


@pytest.mark.parametrize(
    "dtype",
    ["fp32", "bf16-stochastic", "bf16-kahan"],
)
def test_decay_one_freezes(dtype):
    policy = Policy()
    momentum = momentum_of(policy, decay=1.0, dtype=dtype)
    before = snapshot(momentum.weights)
    for step in range(3):
        move(policy, step)
        momentum.update(step, 3)
    assert same_bits(momentum.weights, before)


def test_decay_one_freezes_weight_plus_kahan_term():
    policy = Policy()
    momentum = momentum_of(policy, decay=1.0, dtype="bf16-kahan")
    assert momentum.compensation is not None

    def total() -> torch.Tensor:
        return momentum.weights["matrix"].float() + momentum.compensation["matrix"].float()

    before = total()
    for step in range(3):
        move(policy, step)
        momentum.update(step, 3)
    assert torch.equal(total(), before)


@pytest.mark.parametrize("dtype", MODES)
def test_decay_zero_copies(dtype):
    policy = Policy()
    momentum = momentum_of(policy, decay=0.0, dtype=dtype)
    move(policy, 0)
    momentum.update(0, 1)
    for name, weight in policy.named_parameters():
        stored = momentum.weights[name]
        if dtype == "fp32":
            assert torch.equal(stored, weight)
        elif dtype == "bf16-kahan":
            assert torch.equal(stored, weight.bfloat16())
        else:
            spacing = weight.abs() * 2**-7
            assert (stored.float() - weight).abs().le(spacing).all()
            assert not torch.equal(stored, weight.bfloat16())


@pytest.mark.parametrize("every", [1, 3])
def test_steps_match_the_closed_form(every):
    """k_n = m^n k_0 + sum over updates j of (1 - m) m^(n - j) q_j, where only every p-th step updates."""
    policy, decay, steps = Policy(), 0.9, 12
    momentum = momentum_of(policy, decay=decay, every=every)
    oracle = policy.matrix.detach().double()
    reference = policy.matrix.detach().clone()
    for step in range(steps):
        move(policy, step)
        before = snapshot(momentum.weights)
        momentum.update(step, steps)
        updated = (step + 1) % every == 0
        assert same_bits(momentum.weights, before) is not updated
        if updated:
            oracle = decay * oracle + (1 - decay) * policy.matrix.detach().double()
            reference = decay * reference + (1 - decay) * policy.matrix.detach()
    assert_within_budget(momentum.weights["matrix"], oracle, reference, reduction_length=steps)


def test_constant_policy_is_approached_geometrically():
    policy = Policy()
    momentum = momentum_of(policy, decay=0.99)
    start = policy.vector.detach().double()
    move(policy, 0)
    for step in range(69):
        momentum.update(step, 69)
    share = 0.99**69
    oracle = share * start + (1 - share) * policy.vector.detach().double()
    reference = start.float()
    for _ in range(69):
        reference = 0.99 * reference + 0.01 * policy.vector.detach()
    assert 0.499 < share < 0.501
    assert_within_budget(momentum.weights["vector"], oracle, reference, reduction_length=69)


def test_cosine_schedule():
    config = MomentumConfig(decay=0.99, schedule="cosine", final_decay=0.9999)
    rates = [1 - decay_at(config, step, 101) for step in range(101)]
    assert rates[0] == pytest.approx(1e-2, rel=1e-12)
    assert rates[100] == pytest.approx(1e-4, rel=1e-9)
    assert rates[50] == pytest.approx((1e-2 + 1e-4) / 2, rel=1e-9)
    assert rates[25] == pytest.approx(1e-4 + (1e-2 - 1e-4) * (1 + math.sqrt(0.5)) / 2, rel=1e-9)
    assert rates == sorted(rates, reverse=True)
    assert decay_at(config, 500, 101) == pytest.approx(0.9999, rel=1e-12)
    assert decay_at(config, 0, 1) == pytest.approx(0.99, rel=1e-12)
    assert [decay_at(MomentumConfig(decay=0.97), step, 9) for step in (0, 4, 8)] == [0.97] * 3


def test_cosine_schedule_is_what_update_uses():
    policy = Policy()
    config = MomentumConfig(decay=0.5, schedule="cosine", final_decay=1.0)
    momentum = Momentum(policy, config, seed=0, kernels=KernelsConfig())
    start = policy.vector.detach().clone()
    move(policy, 0)
    momentum.update(10, 11)
    assert torch.equal(momentum.weights["vector"], start)
    momentum.update(0, 11)
    assert torch.equal(momentum.weights["vector"], start.lerp(policy.vector.detach(), 0.5))


def test_a_tied_weight_is_averaged_once():
    policy = tiny_model("qwen3")
    momentum = momentum_of(policy, decay=0.5)
    start = policy.get_input_embeddings().weight.detach().clone()
    move(policy, 0)
    momentum.update(0, 1)
    state = momentum.state_dict()
    expected = start.lerp(policy.get_input_embeddings().weight.detach(), 0.5)
    assert torch.equal(state["lm_head.weight"], expected)
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]


def drift(policy: Policy, dtype: str, steps: int, decay: float) -> Momentum:
    """Momentum of a policy that moved from 1 to 1.01 and stayed there."""
    momentum = momentum_of(policy, decay=decay, dtype=dtype)
    with torch.no_grad():
        policy.matrix.fill_(1.01)
    for step in range(steps):
        momentum.update(step, steps)
    return momentum


def test_bf16_modes_move_where_plain_bf16_stalls():
    steps, decay = 200, 0.999
    shift = 0.01 * (1 - decay**steps)
    plain = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(steps):
        plain = plain.lerp(torch.tensor([1.01], dtype=torch.bfloat16), 1 - decay)
    assert plain.item() == 1.0

    policies = [Policy(512) for _ in range(2)]
    for policy in policies:
        torch.nn.init.ones_(policy.matrix)
    kahan = drift(policies[0], "bf16-kahan", steps, decay)
    assert kahan.compensation is not None
    total = kahan.weights["matrix"].double() + kahan.compensation["matrix"].double()
    # The pair holds about 16 bits; each step rounds once at that precision.
    assert (total - 1 - shift).abs().max() < steps * 2**-17
    assert shift > steps * 2**-17

    stochastic = drift(policies[1], "bf16-stochastic", steps, decay).weights["matrix"].double()
    # Rounding to a grid of spacing s after a move of d has variance d s at most, in each step.
    spacing = 2**-7
    deviation = math.sqrt(steps * 0.01 * (1 - decay) * spacing / stochastic.numel())
    assert abs(stochastic.mean() - 1 - shift) < 5 * deviation < shift / 2
    assert set(stochastic.unique().tolist()) <= {1.0, 1.0 + spacing, 1.0 + 2 * spacing}


def test_kahan_remembers_what_the_first_rounding_lost():
    policy = Policy()
    momentum = momentum_of(policy, dtype="bf16-kahan")
    assert momentum.compensation is not None
    weight = policy.matrix.detach()
    total = momentum.weights["matrix"].float() + momentum.compensation["matrix"].float()
    assert (total - weight).abs().le(weight.abs() * 2**-16).all()


def test_stochastic_bits_follow_the_seed():
    policy = Policy()
    config = MomentumConfig(decay=0.9, dtype="bf16-stochastic")
    runs = [Momentum(policy, config, seed=seed, kernels=KernelsConfig()) for seed in (1, 1, 2)]
    move(policy, 0)
    for momentum in runs:
        momentum.update(0, 2)
    assert same_bits(runs[0].weights, runs[1].weights)
    assert not same_bits(runs[0].weights, runs[2].weights)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_state_dict_is_whole_and_loads(architecture):
    policy = tiny_model(architecture)
    momentum = momentum_of(policy, decay=0.5)
    move(policy, 0)
    momentum.update(0, 1)
    state = momentum.state_dict()
    assert state.keys() == policy.state_dict().keys()
    other = tiny_model(architecture, seed=1)
    other.load_state_dict(state)
    assert same_bits({n: p.detach() for n, p in other.named_parameters()}, momentum.weights)


def test_buffers_are_the_policys():
    policy = Policy()
    momentum = momentum_of(policy, decay=0.9)
    policy.get_buffer("scale").fill_(7.0)
    assert momentum.state_dict()["scale"].tolist() == [7.0]


def test_weights_have_storage_of_their_own():
    policy = Policy()
    momentum = momentum_of(policy)
    before = snapshot(momentum.weights)
    move(policy, 0)
    assert same_bits(momentum.weights, before)
    assert not any(weight.requires_grad for weight in momentum.weights.values())


@pytest.mark.parametrize("dtype", MODES)
def test_load_restores_bit_for_bit(dtype):
    policy = Policy()
    momentum = momentum_of(policy, decay=0.99, dtype=dtype)
    for step in range(3):
        move(policy, step)
        momentum.update(step, 9)
    # A checkpoint hands bf16 weights back in fp32.
    weights = {name: weight.float().clone() for name, weight in momentum.weights.items()}
    terms = snapshot(momentum.compensation) if momentum.compensation else None
    restored = momentum_of(policy, decay=0.99, dtype=dtype)
    restored.load(weights, terms)
    for one in (momentum, restored):
        one.update(3, 9)
    assert same_bits(restored.weights, momentum.weights)
    if terms is not None:
        assert restored.compensation is not None and momentum.compensation is not None
        assert same_bits(restored.compensation, momentum.compensation)


def test_the_engines_copy_is_the_average_rounded_after_every_update_and_load():
    policy = Policy()
    config, kernels = MomentumConfig(decay=0.9, every=2), KernelsConfig()
    momentum = Momentum(policy, config, seed=3, kernels=kernels, engine_dtype=torch.bfloat16)

    def agrees() -> bool:
        found, exact = momentum.state_dict(for_engine=True), momentum.state_dict()
        assert found["matrix"].dtype == torch.bfloat16 and exact["matrix"].dtype == torch.float32
        return found.keys() == exact.keys() and all(
            torch.equal(found[name], exact[name].bfloat16()) for name in ("matrix", "vector")
        )

    assert agrees()
    for step in range(4):
        move(policy, step)
        before = momentum.state_dict(for_engine=True)["matrix"].clone()
        momentum.update(step, 4)
        assert agrees()
        assert torch.equal(before, momentum.state_dict(for_engine=True)["matrix"]) == (step % 2 == 0)
    momentum.load({name: torch.randn_like(weight) for name, weight in momentum.weights.items()})
    assert agrees()
    for dtype, engine_dtype in (("bf16-kahan", torch.bfloat16), ("bf16-kahan", torch.float32), ("fp32", torch.float32)):
        plain = Momentum(policy, MomentumConfig(dtype=dtype), seed=3, kernels=kernels, engine_dtype=engine_dtype)
        assert plain.state_dict(for_engine=True)["matrix"] is plain.weights["matrix"]
