"""Random bits and stochastic rounding, a function of (seed, step, tensor, element) alone."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox 4x32-10 (Salmon et al. 2011) on unsigned words held in int64: four counters, two keys, four results."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        # The product may wrap to a negative int64; its bit pattern is right, and the masks drop the sign's copies.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (right >> 32) & _WORD ^ c1 ^ k0,
            right & _WORD,
            (left >> 32) & _WORD ^ c3 ^ k1,
            left & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def random_words(start: int, count: int, seed: Tensor, step: Tensor, tensor_index: int) -> Tensor:
    """int64 [count] of 32 random bits for the elements from `start`.

    Element e takes word e % 4 of Philox with counter (e // 4 low, e // 4 high, step, tensor_index) and key
    (seed low, seed high).
    """
    quads = torch.arange(start // 4, (start + count + 3) // 4, device=seed.device)
    third, fourth = (step & _WORD).expand_as(quads), torch.full_like(quads, tensor_index & _WORD)
    words = philox((quads & _WORD, quads >> 32, third, fourth), (seed & _WORD, (seed >> 32) & _WORD))
    return torch.stack(words, dim=1).reshape(-1)[start % 4 :][:count]


def round_stochastically(values: Tensor, words: Tensor) -> Tensor:
    """fp32 -> bf16: up with the probability of the dropped fraction, so that the expectation is the value itself."""
    bits = values.view(torch.int32) + (words & 0xFFFF).to(torch.int32)
    rounded = (bits & ~0xFFFF).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
