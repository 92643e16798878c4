"""Schedules over the steps of a run."""

from __future__ import annotations

import math

from mgrpo.config import Config


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of optimiser step `step` (from 0): linear warm-up, then constant or cosine to zero."""
    c, num_steps = config.optim, config.num_optimizer_steps
    warmup = round(c.warmup_ratio * num_steps)
    if step < warmup:
        return c.lr * (step + 1) / warmup
    if c.schedule == "constant":
        return c.lr
    return c.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(num_steps - warmup, 1)))


def is_due(every: int, step: int, last_step: int) -> bool:
    """Whether `step` is a multiple of `every`, or the last; never if `every` is 0."""
    return every > 0 and (step % every == 0 or step == last_step)
