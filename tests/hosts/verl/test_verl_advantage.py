"""Advantage estimator `mgrpo` of verl's registry, alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.ray_trainer import compute_advantage

import mgrpo_kernels as K


def estimate(rewards, mask, index, **kwargs):
    """By the name that verl's configuration would have."""
    scores = torch.zeros(mask.shape)
    scores[:, 0] = torch.as_tensor(rewards, dtype=torch.float32)
    return get_adv_estimator_fn("mgrpo")(token_level_rewards=scores, response_mask=mask, index=index, **kwargs)


@pytest.mark.parametrize(("by_std", "mode"), [(True, "std"), (False, "mean")])
def test_numbers_are_those_of_the_kernel_whatever_the_order(by_std, mode):
    rewards = torch.tensor([[1.0, 0, 0, 1], [0.25, 0.5, 0.75, 0.75], [1, 1, 1, 1]])
    expected = K.group_advantage(rewards, mode=mode)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    index = np.array([f"p{i // 4}" for i in order], dtype=object)
    mask = torch.ones(12, 3)
    advantages, returns = estimate(rewards.flatten()[order], mask, index, config={"norm_adv_by_std_in_grpo": by_std})
    assert torch.equal(advantages, returns) and advantages.shape == (12, 3)
    torch.testing.assert_close(advantages[:, 1], expected.flatten()[order], rtol=0, atol=0)
    assert (advantages == 0).all(1).sum() == 4  # the group of equal rewards


def test_rows_without_a_token_have_no_part_in_their_group():
    mask = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1]])
    advantages, _ = estimate([1.0, 0, 100, 0], mask, ["p"] * 4)
    expected = K.group_advantage(torch.tensor([[1.0, 0, 0, 0]]), keep=torch.tensor([[True, True, False, True]]))[0]
    assert advantages.tolist() == (expected[:, None] * mask).tolist()
    assert advantages[2].tolist() == [0, 0] and advantages[1, 1] == 0 and advantages[0, 0] > 0.5


def test_groups_may_differ_in_size():
    advantages, _ = estimate([1.0, 0, 1, 5, 0], torch.ones(5, 1), ["a", "a", "b", "c", "b"])
    pair = K.group_advantage(torch.tensor([[1.0, 0.0]]))[0]
    assert advantages[:, 0].tolist() == [*pair.tolist(), float(pair[0]), 0.0, float(pair[1])]


def test_no_index_is_refused():
    with pytest.raises(ValueError, match="index must name the prompt of each row, got None"):
        estimate([1.0], torch.ones(1, 1), None)


def test_verl_itself_calls_it_by_name():
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1]])
    rewards = torch.zeros(4, 2)
    rewards[0, 1] = 1.0
    data = DataProto.from_dict(
        tensors={"token_level_rewards": rewards, "response_mask": mask},
        non_tensors={"uid": np.array(["a", "a", "b", "b"], dtype=object)},
    )
    out = compute_advantage(data, adv_estimator="mgrpo").batch["advantages"]
    pair = K.group_advantage(torch.tensor([[1.0, 0.0]]))[0]
    assert out[:, 0].tolist() == [*pair.tolist(), 0.0, 0.0]
