"""Options of logging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mgrpo.config.option import option


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Logging."""

    backends: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Trackers in addition to metrics.jsonl."""
    samples: int = option(0, least=0)
    """Prompts whose rollouts are written to samples/ and shown at every evaluation step."""
    kl_initial_every: int = option(0, least=0)
    """Steps between measurements of the KL to the initial model; 0 is never."""
