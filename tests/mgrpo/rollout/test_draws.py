"""Draws of rollouts depend on their keys alone: seed, prompt, rollout, position."""

from __future__ import annotations

import pytest
import torch

from mgrpo.rollout.draws import uniform

WORD = 2**64 - 1


def mix(x: int) -> int:
    """SplitMix64's output function, in Python's integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


def test_numbers_are_those_of_splitmix64():
    golden = 0x9E3779B97F4A7C15
    # The first outputs of the published generator for state 0.
    assert [mix(golden * i & WORD) for i in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    seeds, prompts, rollouts = (0, 7, 2**48 - 1, 2**63 - 1), (0, 3, 10**9), (0, 1, 4095)
    for seed in seeds:
        rows = [(prompt, rollout) for prompt in prompts for rollout in rollouts]
        found = uniform(seed, *torch.tensor(rows).T, 5)
        assert found.shape == (5, 9) and found.dtype == torch.float64
        for column, (prompt, rollout) in enumerate(rows):
            state = mix(seed + golden & WORD)
            state = mix(state + (prompt + 1) * golden & WORD)
            state = mix(state + (rollout + 1) * golden & WORD)
            for position in range(5):
                bits = mix(state + (position + 1) * golden & WORD) >> 16
                assert found[position, column].item() == (bits + 0.5) / 2**48


def test_a_number_depends_on_its_own_key_alone():
    prompts, rollouts = torch.arange(6).repeat_interleave(4), torch.arange(4).repeat(6)
    whole = uniform(5, prompts, rollouts, 9)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:11]
    assert torch.equal(uniform(5, prompts[order], rollouts[order], 3), whole[:3, order])


@pytest.mark.parametrize("axis", ["seed", "prompt", "rollout", "position"])
def test_neighbours_on_every_axis_are_independent_and_uniform(axis):
    """A chi-square test of pairs of neighbours at 1e-4, and no number twice."""
    n, zero = 40_000, torch.zeros(40_000, dtype=torch.int64)
    if axis == "seed":
        numbers = torch.cat([uniform(seed, zero[:1], zero[:1], 1).flatten() for seed in range(n // 20)])
    elif axis == "position":
        numbers = uniform(3, zero[:1], zero[:1], n).flatten()
    else:
        line = torch.arange(n)
        numbers = uniform(3, *((line, zero) if axis == "prompt" else (zero, line)), 1).flatten()
    assert len(numbers.unique()) == len(numbers) and 0 < numbers.min() and numbers.max() < 1
    cells = (numbers * 8).long()
    counts = torch.bincount(cells[:-1] * 8 + cells[1:], minlength=64).double()
    expected = (len(numbers) - 1) / 64
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert 1e-4 < torch.special.gammaincc(torch.tensor(63 / 2, dtype=torch.float64), statistic / 2) < 1 - 1e-4
