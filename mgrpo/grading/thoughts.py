"""Responses with a thought: finds where it ends, and decodes token ids with its marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# The mark that opens a thought, and the one that closes it, by model family.
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
# Tokens decoded at the end of a prompt: a mark may consist of several.
TAIL_TOKENS = 32


def drop_thought(text: str) -> str | None:
    """The text after the last closed thought, all of it if there is none, and None if a thought is left open.

    A response may lack the opening mark, because chat templates may end the prompt with it.
    """
    if not any(first in text for first in _FIRST):
        return text
    rest = text[max(text.rfind(close) + len(close) if close in text else 0 for close in MARKS.values()) :]
    return None if any(mark in rest for mark in MARKS) else rest


def opened_thought(prompt: str) -> str:
    """The opening mark at the end of a prompt, else an empty string."""
    end = prompt.rstrip()
    return next((mark for mark in MARKS if end.endswith(mark)), "")


def decode_responses(tokenizer: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[str]:
    """Decodes responses for an extractor.

    Special tokens are left out, except the marks of a thought. An opening mark at the end of the prompt is put in front
    of the response, so that a response that never closes the thought has no answer.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: token ids of each response's prompt.
        responses: token ids of each response.
    """
    marks = {*MARKS, *MARKS.values()}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i: str(token) for i, token in added.items() if getattr(token, "special", False)}
    # Tokens that are a mark or a part of one.
    kept = {i for i, t in special.items() if t in marks or (t.startswith("<|") and any(t in mark for mark in marks))}
    if kept:
        dropped = {*special, *tokenizer.all_special_ids} - kept
        rows = [[i for i in row if i not in dropped] for row in responses]
        texts = tokenizer.batch_decode(rows, skip_special_tokens=False)
    else:
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    tails = [tuple(prompt[-TAIL_TOKENS:]) for prompt in prompts]
    opened = {
        tail: opened_thought(tokenizer.decode(list(tail), skip_special_tokens=False)) if tail else ""
        for tail in set(tails)
    }
    return [opened[tail] + text for tail, text in zip(tails, texts, strict=True)]
