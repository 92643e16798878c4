"""Stock verl trains with the plug-in from end to end on a CPU: Ray, its queue, its agent loop, its FSDP2 engine.

Only the rollout engine is a small one of our own, where vLLM or SGLang would be; see tiny_rollout.
"""

from __future__ import annotations

import re

import pytest
from safetensors.torch import load_file
from small_verl import events, overrides, train

pytestmark = pytest.mark.slow
MOMENTUM = "checkpoints/global_step_{}/actor/momentum_world_size_1_rank_0.safetensors"


@pytest.fixture(scope="module")
def first(tmp_path_factory, model_folder, data_file):
    """Two steps, a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("first")
    result = train(folder, overrides(model_folder, data_file, folder, trainer__save_freq=2))
    assert result.returncode == 0, result.stderr[-5000:]
    return folder, result


def metrics(output: str, step: int) -> dict[str, float]:
    """A line of verl's console logger."""
    line = next(line for line in output.splitlines() if f"step:{step} - " in line)
    return {name: float(value) for name, value in re.findall(r"([\w/]+):(?:np\.\w+\()?(-?[\d.]+(?:e-?\d+)?)", line)}


def by_load(seen):
    """For each time that weights came: their version and norm, and how many rollouts they made."""
    loads = [event for event in seen if event["event"] == "load"]
    made = [event["load"] for event in seen if event["event"] == "generate"]
    return [(load["version"], load["norm"], made.count(i + 1)) for i, load in enumerate(loads)]


def norm(tensors) -> float:
    return sum(float(t.double().pow(2).sum()) for t in tensors.values()) ** 0.5


def test_each_step_rolls_out_the_policy_and_then_the_momentum_model(first):
    policy0, momentum0, policy1, momentum1, policy2 = by_load(events(first[0]))
    # 4 prompts; 4 rollouts each of the policy and 2 of the momentum model.
    assert [load[2] for load in (policy0, momentum0, policy1, momentum1, policy2)] == [16, 8, 16, 8, 0]
    assert [load[0] for load in (policy0, momentum0, policy1, momentum1, policy2)] == [0, 0, 1, 1, 2]
    assert momentum0[1] == policy0[1]  # nothing is trained yet
    assert 0 < abs(momentum1[1] - policy0[1]) < 0.1 * abs(policy1[1] - policy0[1])  # 1 % an optimiser step


def test_votes_reach_the_rewards_and_the_loss(first):
    for step in (1, 2):
        found = metrics(first[1].stdout, step)
        assert found["critic/score/mean"] == pytest.approx(found["mgrpo/reward_mean"])
        assert 0 <= found["mgrpo/majority_share"] <= 1 and found["mgrpo/response_length_momentum"] > 0
        assert abs(found["critic/advantages/mean"]) < 0.5 and found["actor/grad_norm"] >= 0
    assert any(metrics(first[1].stdout, step)["actor/grad_norm"] > 0 for step in (1, 2))


def test_a_run_goes_on_from_verls_checkpoint_with_the_same_momentum_model(first, tmp_path, model_folder, data_file):
    folder, _ = first
    saved = load_file(folder / MOMENTUM.format(2))
    options = overrides(model_folder, data_file, folder, trainer__total_training_steps=3, trainer__save_freq=3)
    result = train(tmp_path, [*options, "mgrpo.patch_kernels=true"])
    assert result.returncode == 0, result.stderr[-5000:]
    policy2, momentum2, policy3 = by_load(events(tmp_path))
    assert policy2[:2] == pytest.approx(by_load(events(folder))[-1][:2])
    # The embedding is exported a second time, as the head that is tied to it.
    exported = saved | {"head": saved["model.embed_tokens.weight"]}
    assert momentum2[1] == pytest.approx(norm(exported), rel=1e-9)
    assert (policy2[2], momentum2[2], policy3[2]) == (16, 8, 0)
    assert metrics(result.stdout, 3)["actor/grad_norm"] >= 0
    assert load_file(folder / MOMENTUM.format(3)).keys() == saved.keys()
