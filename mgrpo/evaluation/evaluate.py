"""Accuracy of an engine's weights on labelled prompts.

Letters: B prompts, k sampled responses a prompt.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mgrpo.data.load import describe_unread
from mgrpo.data.prompts import Dataset
from mgrpo.errors import InputError
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.label_text import Label
from mgrpo.models.load import LoadedModel
from mgrpo.rollout.engine import Engine
from mgrpo.rollout.stop import StopTexts, read_texts
from mgrpo.types import Rollouts, Sampling, WeightTag


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Shares in [0, 1] over B prompts with k sampled responses each.

    A standard error is over prompts, std (n-1) of the per-prompt values / sqrt(B), and NaN for one prompt.
    """

    num_prompts: int
    samples: int  # k
    greedy: float | None  # accuracy of greedy decoding, None if not requested
    greedy_se: float | None
    avg_at_k: float  # accuracy of single samples
    avg_at_k_se: float
    maj_at_k: float  # accuracy of the most common answer
    maj_at_k_se: float
    pass_at_k: float  # share of prompts with at least one correct sample
    pass_at_k_se: float
    pass_at: dict[int, float]  # unbiased estimate for 1, 2, 4, ... <= k samples
    unparseable_share: float  # of the samples, as for the next two
    truncated_share: float
    mean_length: float  # tokens, EOS included


def summarize(
    correct: torch.Tensor,
    majority_correct: torch.Tensor,
    *,
    unparseable: torch.Tensor,
    truncated: torch.Tensor,
    lengths: torch.Tensor,
    greedy_correct: torch.Tensor | None = None,
) -> Evaluation:
    """Means over prompts and their standard errors; pass@j = 1 - C(k - c, j) / C(k, j) for c correct of k.

    Args:
        correct: [B, k] bool, True for a correct sample; B and k at least 1.
        majority_correct: [B] bool, True if the most common answer is correct.
        unparseable: [B, k] bool, samples without an answer.
        truncated: [B, k] bool, samples cut at the length limit.
        lengths: [B, k] response tokens.
        greedy_correct: [B] bool, or None.

    Numerics: fp64; binomials are exact integers.
    Source: Chen et al., arXiv 2107.03374, equation 1.
    """
    num_prompts, samples = correct.shape
    num_right = correct.sum(1).tolist()
    by_prompt = {"greedy": greedy_correct, "avg_at_k": correct.double().mean(1), "maj_at_k": majority_correct}
    estimates: dict[str, Any] = {}
    for name, values in (by_prompt | {"pass_at_k": correct.any(1)}).items():
        estimates[name], estimates[f"{name}_se"] = (None, None) if values is None else _mean_and_error(values)
    return Evaluation(
        num_prompts=num_prompts,
        samples=samples,
        **estimates,
        pass_at={
            j: sum(1 - math.comb(samples - c, j) / math.comb(samples, j) for c in num_right) / num_prompts
            for j in (2**i for i in range(samples.bit_length()))
        },
        unparseable_share=unparseable.double().mean().item(),
        truncated_share=truncated.double().mean().item(),
        mean_length=lengths.double().mean().item(),
    )


def _mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean of [B] and its standard error."""
    values = values.double()
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error


def evaluate(
    engine: Engine,
    loaded: LoadedModel,
    dataset: Dataset,
    extract: Callable[[str], str | None],
    checker: AnswerChecker,
    sampling: Sampling,
    *,
    samples: int,
    tag: WeightTag,
    greedy: bool = True,
    stop: StopTexts | None = None,
    check: Callable[[Rollouts], None] | None = None,
) -> Evaluation:
    """Samples `samples` responses a prompt, decodes one greedily, and compares their answers with the true ones.

    Args:
        engine: generates the responses.
        loaded: has the tokenizer that decodes them.
        dataset: prompts, each with its true answer.
        extract: returns the answer of a response, None without one.
        checker: groups answers into classes and compares them with the truth.
        sampling: options of the samples; greedy decoding shares their length limit.
        samples: k, at least 1.
        tag: of the weights that the engine holds.
        greedy: also decode greedily.
        stop: texts at which the engine ends a response; they are removed before extraction.
        check: called with the samples before their answers are read.

    Raises:
        InputError: a prompt has no answer, or `samples` is below 1.
    """
    truths = _truths(dataset)
    if samples < 1:
        raise InputError(f"evaluate: samples must be at least 1, got {samples}.")
    prompts = [prompt.ids for prompt in dataset.prompts]

    answers = partial(_read_answers, prompts, partial(read_texts, loaded.tokenizer, stop=stop), extract)
    rollouts = engine.generate(prompts, samples, sampling, tag)
    if check:
        check(rollouts)
    sampled = answers(rollouts)
    # Grouped first, because the fingerprints of grouping also speed up the comparison with the truth.
    majority = [[answer] for answer in _most_common(sampled, checker)]
    greedy_correct = None
    if greedy:
        coldest = dataclasses.replace(sampling, temperature=0.0, top_p=1.0)
        decoded = answers(engine.generate(prompts, 1, coldest, tag))
        greedy_correct = torch.tensor(_grade(decoded, truths, checker))[:, 0]
    return summarize(
        torch.tensor(_grade(sampled, truths, checker)),
        torch.tensor(_grade(majority, truths, checker))[:, 0],
        unparseable=torch.tensor([[answer is None for answer in group] for group in sampled]),
        truncated=rollouts.truncated.view(-1, samples),
        lengths=rollouts.lengths.view(-1, samples),
        greedy_correct=greedy_correct,
    )


def _read_answers(
    prompts: Sequence[Sequence[int]],
    read: Callable[..., list[str]],
    extract: Callable[[str], str | None],
    rollouts: Rollouts,
) -> list[list[str | None]]:
    """The answer of every rollout, [B][n]; None without one."""
    n = rollouts.num_per_prompt
    rows = [rollouts.response(row) for row in range(len(prompts) * n)]
    answers = list(map(extract, read(rows, prompts=[prompts[row // n] for row in range(len(rows))])))
    return [answers[row : row + n] for row in range(0, len(rows), n)]


def _truths(dataset: Dataset) -> list[Label]:
    """True answers of all prompts."""
    missing = [prompt.index for prompt in dataset.prompts if prompt.answer is None]
    if missing:
        hint = f" {describe_unread(dataset)}" if dataset.unread else ""
        raise InputError(
            f"evaluate: prompts must have answers, got {len(missing)} of {len(dataset)} without, "
            f"the first at index {missing[0]}.{hint} Add answers, or name the key that holds them."
        )
    return [prompt.answer for prompt in dataset.prompts if prompt.answer is not None]


def _grade(groups: Sequence[Sequence[str | None]], truths: Sequence[Label], checker: AnswerChecker) -> list[list[bool]]:
    """Whether each answer equals its prompt's true answer; each distinct text of a prompt is compared once."""
    graded = []
    for group, truth in zip(groups, truths, strict=True):
        right = {answer: checker.is_correct(answer, truth) for answer in dict.fromkeys(group) if answer is not None}
        graded.append([answer is not None and right[answer] for answer in group])
    return graded


def _most_common(groups: Sequence[Sequence[str | None]], checker: AnswerChecker) -> list[str | None]:
    """The first answer of each prompt's largest class, the earliest class on a tie; None without answers."""
    winners = []
    for group, classes in zip(groups, checker.group_classes(groups), strict=True):
        counts = Counter(i for i in classes if i >= 0)  # in order of first appearance, so max takes the earliest
        winners.append(group[classes.index(max(counts, key=counts.__getitem__))] if counts else None)
    return winners
