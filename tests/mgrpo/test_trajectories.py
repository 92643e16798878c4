"""Joining the rollouts of both sources."""

from __future__ import annotations

import torch
from helpers import padded

from mgrpo.types import Rollouts, WeightTag, join

PROMPTS = [[2, 3], [4, 5, 6]]


def rollouts(source: str, responses: list[list[int]], n: int) -> Rollouts:
    lengths = torch.tensor([len(r) for r in responses])
    return Rollouts(
        tokens=padded(responses, None, 0),
        lengths=lengths,
        logprobs=padded([[-0.5 * token for token in r] for r in responses]),
        truncated=torch.tensor([len(r) == 2 for r in responses]),
        num_per_prompt=n,
        tag=WeightTag(source, 1),
    )


POLICY = rollouts("policy", [[7, 8], [9, 10, 1], [11, 1], [12, 13, 1]], 2)
MOMENTUM = rollouts("momentum", [[14, 15, 16, 17, 1], [18, 1]], 1)
ORDER = [[7, 8], [9, 10, 1], [14, 15, 16, 17, 1], [11, 1], [12, 13, 1], [18, 1]]


def test_join_interleaves_prompt_by_prompt():
    joined = join(PROMPTS, POLICY, MOMENTUM)
    assert [joined.response(row) for row in range(6)] == ORDER
    assert [joined.prompt(row) for row in range(6)] == [[2, 3]] * 3 + [[4, 5, 6]] * 3
    assert joined.lengths.tolist() == [[2, 3, 5], [2, 3, 2]]
    assert joined.is_momentum.tolist() == [[False, False, True]] * 2
    assert joined.truncated.tolist() == [[True, False, False], [True, False, True]]
    assert joined.num_policy == 2


def test_join_pads_log_probs_with_the_tokens():
    joined = join(PROMPTS, POLICY, MOMENTUM)
    assert joined.mask.sum(1).tolist() == [len(r) for r in ORDER]
    assert torch.equal(joined.rollout_logprob, -0.5 * joined.tokens * joined.mask)
    assert joined.tokens[~joined.mask].eq(0).all()


def test_join_of_the_policy_alone():
    joined = join(PROMPTS, POLICY, None)
    assert [joined.response(row) for row in range(4)] == [r for r in ORDER if r[0] not in (14, 18)]
    assert not joined.is_momentum.any()
    assert joined.lengths.tolist() == [[2, 3], [2, 3]]


def test_join_with_the_policy_longer():
    joined = join(PROMPTS, MOMENTUM, POLICY)
    assert joined.num_policy == 1
    assert [joined.response(row) for row in range(3)] == [ORDER[2], ORDER[0], ORDER[1]]


def test_rollouts_cut_their_padding():
    assert [MOMENTUM.response(row) for row in range(2)] == [[14, 15, 16, 17, 1], [18, 1]]
    assert MOMENTUM.mask.tolist() == [[True] * 5, [True, True, False, False, False]]
