"""From verl's rows to groups and back: credit for the rows of a batch, without Ray or a queue.

Letters: R rows (trajectories), L padded response tokens, B prompts, M policy and N momentum rollouts a prompt, G=M+N.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import mgrpo_kernels as K
from mgrpo.algorithm.credit import Credit, assign_credit
from mgrpo.config import Config
from mgrpo.grading.checker import AnswerChecker
from mgrpo.integrations.shared import credit_metrics, make_truth_reader
from mgrpo.types import Metrics

# Marks a momentum rollout's prompt, so that its key in verl's queue differs from a policy rollout's. No underscore.
MOMENTUM = "-momentum"


def places_in_groups(index: Sequence[Hashable]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and place in its group of each row, [R] int64 both, in order of first appearance."""
    prompts: dict[Hashable, int] = {}
    sizes: dict[Hashable, int] = {}
    places = []
    for uid in index:
        prompts.setdefault(uid, len(prompts))
        places.append(sizes.setdefault(uid, 0))
        sizes[uid] += 1
    return torch.tensor([prompts[uid] for uid in index], dtype=torch.int64), torch.tensor(places, dtype=torch.int64)


def arrange(keys: Sequence[str], num_policy: int, num_momentum: int) -> torch.Tensor:
    """Rows of each prompt's group, policy rollouts first, in order of their sessions.

    Args:
        keys: [R], of verl's queue: `{uid}_{session}_{output}`, of momentum rollouts `{uid}-momentum_...`; in any order.
        num_policy: M.
        num_momentum: N.

    Returns:
        [B, G] int64, prompts in order of first appearance.

    Raises:
        ValueError: a prompt without exactly M and N rollouts, or a rollout with several outputs.
    """
    groups: dict[str, tuple[dict[int, int], dict[int, int]]] = {}
    for row, key in enumerate(keys):
        uid, session, output = key.rsplit("_", 2)
        if output != "0":
            raise ValueError(
                f"mgrpo: every rollout must be one trajectory, got output {output} of {key}. Use an agent loop with "
                "one output, such as single_turn_agent."
            )
        prompt = uid.removesuffix(MOMENTUM)
        groups.setdefault(prompt, ({}, {}))[prompt != uid][int(session)] = row
    wrong = {uid: (len(p), len(m)) for uid, (p, m) in groups.items() if (len(p), len(m)) != (num_policy, num_momentum)}
    if wrong or not groups:
        uid, (policy, momentum) = next(iter(wrong.items()), ("no prompt", (0, 0)))
        raise ValueError(
            f"mgrpo: every prompt must have {num_policy} policy and {num_momentum} momentum rollouts, got {policy} and "
            f"{momentum} for {uid}, and other numbers for {len(wrong)} of {len(groups)} prompts. Look for failed "
            "rollouts in the log of the agent loop; a vote takes whole groups."
        )
    return torch.tensor(
        [[rows[i] for rows in group for i in sorted(rows)] for group in groups.values()], dtype=torch.int64
    )


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Inputs of the vote for R trajectories, in any order."""

    keys: list[str]  # [R]
    texts: list[str]  # [R], responses
    entropy: torch.Tensor  # [R, L] fp32, token entropies of the policy, nats
    mask: torch.Tensor  # [R, L] bool, tokens that the model wrote
    truncated: torch.Tensor  # [R] bool, cut at the length limit
    true_answers: list[Any]  # [R], raw labels, None where there is none


def merge_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of several batches, one after the other."""
    length = max(part.mask.shape[1] for part in parts)

    def widen(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, length - values.shape[1]))

    return Rows(
        keys=[key for part in parts for key in part.keys],
        texts=[text for part in parts for text in part.texts],
        entropy=torch.cat([widen(part.entropy) for part in parts]),
        mask=torch.cat([widen(part.mask) for part in parts]),
        truncated=torch.cat([part.truncated for part in parts]),
        true_answers=[answer for part in parts for answer in part.true_answers],
    )


@dataclass(frozen=True, kw_only=True)
class GroupCredit:
    """Credit of each row, and metrics of the step."""

    rewards: torch.Tensor  # [R] fp32
    advantage: torch.Tensor  # [R] fp32
    trains: torch.Tensor  # [R] bool, enters the loss
    credit: Credit
    metrics: Metrics


def credit_rows(
    rows: Rows, config: Config, *, extract: Callable[[str], str | None], checker: AnswerChecker, backend: str = "auto"
) -> GroupCredit:
    """Filters, votes, rewards and compares within groups; returns the credit of each row.

    Args:
        rows: all rollouts of a step, without verl's padding rows.
        config: its rollout, filter, vote and objective are used.
        extract: finds the answer in a response, None where there is none.
        checker: decides which answers are equal.
        backend: backend of mgrpo_kernels.

    Raises:
        ValueError: uneven groups.

    Source: arXiv 2512.13070, algorithm 1.
    """
    num_policy, num_momentum = config.rollout.num_policy, config.rollout.num_momentum
    group = arrange(rows.keys, num_policy, num_momentum)
    answers = [extract(text) for text in rows.texts]
    entropy = K.trajectory_entropy(rows.entropy.float(), mask=rows.mask, reduce="mean", backend=backend)
    lengths = rows.mask.sum(1)
    # True answers are used for metrics, and by objective.reward labels.
    read = make_truth_reader(config.answer.label_extract)
    true = [read(rows.true_answers[row]) for row in group[:, 0].tolist()]
    may_train = (torch.arange(group.shape[1]) < config.num_train).expand(group.shape)
    if config.rollout.truncated == "mask":
        may_train = may_train & ~rows.truncated[group]
    filtered = entropy if config.filter.entropy == "mean" else entropy * lengths
    credit = assign_credit(
        [[answers[row] for row in prompt] for prompt in group.tolist()],
        filtered[group],
        num_policy,
        filter=config.filter,
        vote=config.vote,
        objective=config.objective,
        checker=checker,
        may_train=may_train,
        mean_entropy=entropy[group],
        true_answers=true,
        backend=backend,
    )
    metrics = credit_metrics(
        credit,
        lengths=lengths[group],
        truncated=rows.truncated[group],
        entropy=entropy[group],
        true_answers=true,
        checker=checker,
    )
    place = group.flatten().argsort()  # of each row in the groups
    of_rows = {name: getattr(credit, name).flatten()[place] for name in ("rewards", "advantage", "trains")}
    return GroupCredit(**of_rows, credit=credit, metrics=metrics)


def place_rewards(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[R, L] fp32, each row's reward at the last token that the model wrote, 0 elsewhere."""
    mask = mask.bool()
    out = torch.zeros(mask.shape, dtype=torch.float32)
    rows = mask.any(1)
    last = mask.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(1)
    out[rows, last[rows]] = rewards[rows].float()
    return out
