"""Options of evaluation during training."""

from __future__ import annotations

from dataclasses import dataclass

from mgrpo.config.option import option


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the eval set during training."""

    every: int = option(25, least=0)
    """Steps between evaluations; 0 is never."""
    samples: int = option(4, least=1)
    """Sampled responses a prompt, in addition to the greedy one."""
