"""Options of sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mgrpo.config.option import option


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sampling of responses."""

    num_prompts: int = option(16, least=1)
    """B, prompts a step."""
    num_policy: int = option(12, least=1)
    """M, rollouts a prompt from the policy."""
    num_momentum: int = option(4, least=0)
    """N, rollouts a prompt from the momentum model. 0 is plain self-reward."""
    temperature: float = option(1.0, above=0)
    """Sampling temperature; every log-prob and entropy is taken at it."""
    top_p: float = option(1.0, above=0, most=1)
    """Nucleus sampling; 1 is off."""
    max_new_tokens: int = option(64, least=1)
    """Longest response in tokens, EOS included."""
    stop: tuple[str, ...] | None = None
    """Texts that end a response; `\\n` stands for a newline. The answer is read from the text before the first of them.
    None is the label before the prompt in a `data.template` of text, as '\\nQuestion:'; '' is no text."""
    truncated: Literal["train", "mask"] = "train"
    """Whether rollouts cut at the length limit are in the loss, or only vote."""
    ahead: int = option(0, least=0, most=1)
    """1 samples the rollouts of the next step while this one trains, with weights that are one step older; for vLLM in
    other processes."""
    parity_every: int = option(50, least=0, resumable=True)
    """Steps between comparisons of the engine's log-probs with the trainer's; the first two steps
    always compare, and with `ahead` the third, the first under other weights."""
