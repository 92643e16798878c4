"""Options of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from mgrpo.config.option import option


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints."""

    every: int = option(50, least=0)
    """Steps between checkpoints; 0 saves only at the end."""
    keep_last: int = option(2, least=1)
    """Newest checkpoints kept."""
    keep_best: int = option(1, least=0)
    """Best checkpoints kept in addition: by accuracy on the eval set; without one, the last from well before any
    alarm."""
    background: bool = True
    """Write during training, from a copy of the state in host memory."""
