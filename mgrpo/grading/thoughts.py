"""Responses of models that think: where the thought ends, and texts of token ids that keep its marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What opens a thought and what closes it, by model family.
MARKS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<seed:think>": "</seed:think>",
    "◁think▷": "◁/think▷",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "[THINK]": "[/THINK]",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<unused94>": "<unused95>",
    "<longcat_think>": "</longcat_think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|inner_prefix|>": "<|inner_suffix|>",
    "<|channel>thought": "<channel|>",
    "<|channel|>analysis<|message|>": "<|channel|>final<|message|>",
}
_FIRST = {mark[0] for mark in (*MARKS, *MARKS.values())}
# Tokens at the end of a prompt that are looked at: a mark that is no token of its own takes some.
TAIL_TOKENS = 32


def drop_thought(text: str) -> str | None:
    """What follows the last closed thought, the text itself where it has none; None where one is opened and left open.

    A response need not hold the opening mark: chat templates may end the prompt with it.
    """
    if not any(first in text for first in _FIRST):
        return text
    start = 0
    for close in MARKS.values():
        start = max(start, text.rfind(close) + len(close) if close in text else 0)
    rest = text[start:]
    return None if any(mark in rest for mark in MARKS) else rest


def opened_thought(prompt: str) -> str:
    """The mark with which a prompt ends that opens the model's thought, else nothing."""
    end = prompt.rstrip()
    return next((mark for mark in MARKS if end.endswith(mark)), "")


def _is_of_mark(token: str, marks: set[str]) -> bool:
    """Whether a token is a mark, or one of several that a mark consists of."""
    return token in marks or (token.startswith("<|") and any(token in mark for mark in marks))


def decode_responses(tokenizer: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[str]:
    """Texts of responses, given as token ids, as an extractor has to see them.

    Special tokens are left out, but for marks of a thought; a mark that opens one at the end of the prompt comes first,
    so that a response that never closes it has no answer.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: token ids of each response's prompt.
        responses: as many.
    """
    marks = {*MARKS, *MARKS.values()}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    kept = {i for i, token in added.items() if getattr(token, "special", False) and _is_of_mark(str(token), marks)}
    if kept:
        special = {i for i, token in added.items() if getattr(token, "special", False)} | set(tokenizer.all_special_ids)
        rows = [[i for i in row if i in kept or i not in special] for row in responses]
        texts = tokenizer.batch_decode(rows, skip_special_tokens=False)
    else:
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    tails = [tuple(prompt[-TAIL_TOKENS:]) for prompt in prompts]
    opened = {
        tail: opened_thought(tokenizer.decode(list(tail), skip_special_tokens=False)) if tail else ""
        for tail in set(tails)
    }
    return [opened[tail] + text for tail, text in zip(tails, texts, strict=True)]
