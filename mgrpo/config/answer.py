"""Options of answers and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mgrpo.config.option import option


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """Reading and comparing answers."""

    extract: str = "boxed"
    """`boxed` (last \\boxed{} with content), `hash` (after the last ####), `last-number`, `regex:PATTERN` (last match,
    group 1). Text before the end of a thought (`</think>`) is not read."""
    label_extract: str = "auto"
    """Form of the true answer in a label, independent of `extract`: `auto` (last box, else the line after
    ####, else <answer> tags or what "the answer is" at its end, else the label itself), `plain` (the label itself),
    `boxed`, `hash`, `last-number`, `regex:PATTERN`. Labels of the built-in problems are plain."""
    equivalence: Literal["math", "exact"] = "math"
    """Comparison of two answers: `math` by math-verify in worker processes, `exact` by normalised text alone."""
    timeout_s: float = option(5.0, above=0)
    """Limit of one math-verify comparison in seconds of CPU time; beyond it the two answers count as different."""
    workers: int | None = option(None, least=1, most=1024, resumable=True)
    """Processes that compare answers, each about 100 MB; they start when first needed. None is one for each available
    core, at most 8."""
