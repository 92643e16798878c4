"""Random numbers of rollouts: each is a function of its own key, so that it does not depend on what else is sampled."""

from __future__ import annotations

import torch

# SplitMix64: the increment of its state, and the factors of its output function (Steele, Lea and Flood, 2014).
_INCREMENT, _FACTORS = -0x61C8864680B583EB, (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_BITS = 48


def uniform(seed: int, prompts: torch.Tensor, rollouts: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Uniform numbers for the tokens of R rollouts, by (seed, prompt, rollout, position).

    Args:
        seed: of the stream, below 2**63.
        prompts, rollouts: [R] int64, index of each row's prompt, and of the rollout among those of its prompt.
        num_tokens: L, positions from 0.

    Returns:
        [L, R] fp64 on the device of `prompts`, multiples of 2**-49 strictly between 0 and 1.
    """
    state = _mix(torch.tensor(seed, device=prompts.device) + _INCREMENT)
    for part in (prompts, rollouts):
        state = _mix(state + (part + 1) * _INCREMENT)
    positions = torch.arange(1, num_tokens + 1, device=prompts.device)
    bits = _shift(_mix(state + positions[:, None] * _INCREMENT), 64 - _BITS)
    return (bits.double() + 0.5) * 2.0**-_BITS


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function, in int64 that wraps around."""
    x = (x ^ _shift(x, 30)) * _FACTORS[0]
    x = (x ^ _shift(x, 27)) * _FACTORS[1]
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
