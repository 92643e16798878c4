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
    greedy: float | None  # accuracy of greedy decoding; None where it was not asked for
    greedy_se: float | None
    avg_at_k: float  # accuracy of single samples
    avg_at_k_se: float
    maj_at_k: float  # accuracy of the commonest answer
    maj_at_k_se: float
    pass_at_k: float  # prompts with at least one right sample
    pass_at_k_se: float
    pass_at: dict[int, float]  # unbiased estimate for 1, 2, 4, ... <= k samples
    unparseable_share: float  # of the samples, as are the next two
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
    """Means over prompts and their standard errors; pass@j = 1 - C(k - c, j) / C(k, j) for c right among k.

    Args:
        correct: [B, k] bool, whether each sample is right; B and k at least 1.
        majority_correct: [B] bool, whether the commonest answer is right.
        unparseable: [B, k] bool, samples without an answer.
        truncated: [B, k] bool, samples cut at the length limit.
        lengths: [B, k] response tokens.
        greedy_correct: [B] bool, or None.

    Numerics: fp64; binomials are exact integers.
    Source: Chen et al., arXiv 2107.03374, equation 1.
    """
    num_prompts, samples = correct.shape
    num_right = correct.sum(1).tolist()
    average, average_se = _mean_and_error(correct.double().mean(1))
    majority, majority_se = _mean_and_error(majority_correct)
    passed, passed_se = _mean_and_error(correct.any(1))
    greedy, greedy_se = (None, None) if greedy_correct is None else _mean_and_error(greedy_correct)
    return Evaluation(
        num_prompts=num_prompts,
        samples=samples,
        greedy=greedy,
        greedy_se=greedy_se,
        avg_at_k=average,
        avg_at_k_se=average_se,
        maj_at_k=majority,
        maj_at_k_se=majority_se,
        pass_at_k=passed,
        pass_at_k_se=passed_se,
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
        engine: generates.
        loaded: whose tokenizer decodes.
        dataset: prompts, each with its true answer.
        extract: reads an answer from a response, None where there is none.
        checker: groups answers into classes and compares them with the truth.
        sampling: how samples are drawn; greedy decoding shares its length limit.
        samples: k, at least 1.
        tag: of the weights that the engine holds.
        greedy: also decode greedily.
        stop: texts at which the engine ends a response, which are no part of an answer.
        check: looks at the samples before anything is read from them.

    Raises:
        InputError: a prompt has no answer, or `samples` is below 1.
    """
    truths = _truths(dataset)
    if samples < 1:
        raise InputError(f"evaluate: samples must be at least 1, got {samples}.")
    prompts = [prompt.ids for prompt in dataset.prompts]

    answers = partial(_read_answers, prompts, tokenizer=loaded.tokenizer, stop=stop, extract=extract)
    rollouts = engine.generate(prompts, samples, sampling, tag)
    if check:
        check(rollouts)
    sampled = answers(rollouts)
    # Grouped first: what that finds out of an answer also tells it from the truth.
    majority = [[answer] for answer in _commonest(sampled, checker)]
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
    rollouts: Rollouts,
    *,
    tokenizer: Any,
    stop: StopTexts | None,
    extract: Callable[[str], str | None],
) -> list[list[str | None]]:
    """Answers of every rollout, [B][n]; None where there is none."""
    n = rollouts.num_per_prompt
    rows = [rollouts.response(row) for row in range(len(prompts) * n)]
    texts = read_texts(tokenizer, rows, stop, prompts=[prompts[row // n] for row in range(len(rows))])
    return [[extract(text) for text in texts[b * n : (b + 1) * n]] for b in range(len(prompts))]


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
    """Whether each answer equals its prompt's truth; every distinct text of a prompt is compared once."""
    graded = []
    for group, truth in zip(groups, truths, strict=True):
        right = {answer: checker.is_correct(answer, truth) for answer in dict.fromkeys(group) if answer is not None}
        graded.append([answer is not None and right[answer] for answer in group])
    return graded


def _commonest(groups: Sequence[Sequence[str | None]], checker: AnswerChecker) -> list[str | None]:
    """First answer of each prompt's largest class, the earliest class on a tie; None where nobody answers."""
    commonest = []
    for group, classes in zip(groups, checker.group_classes(groups), strict=True):
        counts = Counter(i for i in classes if i >= 0)  # in order of first appearance, so max takes the earliest
        commonest.append(group[classes.index(max(counts, key=counts.__getitem__))] if counts else None)
    return commonest
