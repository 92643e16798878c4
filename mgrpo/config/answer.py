"""Options of answers and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mgrpo.config.option import option


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How an answer is read from a response and compared."""

    extract: str = "boxed"
    """`boxed` (last \\boxed{} with content), `hash` (after the last ####), `last-number`, `regex:PATTERN` (last match,
    group 1). What stands before the end of a thought (`</think>`) is not read."""
    label_extract: str = "auto"
    """How the true answer is read from a label, whatever responses look like: `auto` (last box, else the line after
    ####, else <answer> tags or what "the answer is" at its end, else the label itself), `plain` (the label itself),
    `boxed`, `hash`, `last-number`, `regex:PATTERN`. Labels of the built-in problems are plain."""
    equivalence: Literal["math", "exact"] = "math"
    """`math` decides by math-verify in worker processes, `exact` by normalised text alone."""
    timeout_s: float = option(5.0, above=0)
    """Limit of one math-verify comparison in seconds of processor time; past it two answers count as different."""
    workers: int | None = option(None, least=1, most=1024, resumable=True)
    """Processes that compare answers, each about 100 MB; they start when first needed. As many as this process may use
    cores, at most 8, when None."""
