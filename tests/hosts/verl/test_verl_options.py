"""M-GRPO's options in verl's configuration; needs no verl."""

from __future__ import annotations

import copy

import pytest

from mgrpo.errors import ConfigError
from mgrpo.integrations.verl.options import read_options

VERL = {
    "algorithm": {"adv_estimator": "mgrpo", "use_kl_in_reward": False},
    "data": {"train_batch_size": 8, "max_response_length": 64},
    "trainer": {"total_training_steps": None, "default_hdfs_dir": None, "v1": {}},
    "actor_rollout_ref": {
        "hybrid_engine": True,
        "model": {"lora_rank": 0, "lora_adapter_path": None},
        "actor": {"strategy": "fsdp2", "ppo_mini_batch_size": 2, "ppo_epochs": 3},
        "rollout": {"n": 6, "temperature": 1},
    },
}


def make(mgrpo=None, **changes):
    """verl's configuration with options changed by dotted names (`__` for the dot)."""
    config = copy.deepcopy(VERL)
    for name, value in changes.items():
        *path, last = name.split("__")
        node = config
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return config | ({} if mgrpo is None else {"mgrpo": mgrpo})


def test_names_and_defaults_are_those_of_the_trainer():
    options = read_options(make())
    assert options.recipe.rollout.num_momentum == 4 and options.recipe.momentum.decay == 0.99
    assert options.recipe.filter.k == 0.75 and options.patch_kernels is False
    options = read_options(
        make(
            {
                "rollout": {"num_momentum": 2},
                "momentum": {"decay": 0.5, "every": 3},
                "filter": {"k": 1, "scope": "prompt"},
                "vote": {"pool": "momentum", "momentum_weight": 2},
                "objective": {"advantage": "mean"},
                "patch_kernels": True,
            }
        )
    )
    recipe = options.recipe
    assert (recipe.rollout.num_momentum, recipe.momentum.decay, recipe.momentum.every) == (2, 0.5, 3)
    assert (recipe.filter.k, recipe.filter.scope, recipe.vote.pool) == (1.0, "prompt", "momentum")
    assert recipe.objective.advantage == "mean" and options.patch_kernels is True


def test_what_verl_knows_is_taken_from_verl():
    recipe = read_options(make()).recipe
    assert (recipe.rollout.num_policy, recipe.rollout.num_prompts, recipe.rollout.max_new_tokens) == (6, 8, 64)
    # 8 prompts in minibatches of 2, thrice a step.
    assert read_options(make(), total_training_steps=10).recipe.num_optimizer_steps == 10 * 4 * 3
    assert read_options(make(trainer__total_training_steps=5)).recipe.num_optimizer_steps == 5 * 4 * 3


@pytest.mark.parametrize(
    ("mgrpo", "message"),
    [
        ({"momentun": {}}, r"mgrpo.momentun is not a known key. Did you mean momentum\?"),
        ({"filter": {"kk": 1}}, r"mgrpo.filter.kk is not a known key. Did you mean k\?"),
        ({"rollout": {"temperature": 1.0}}, r"mgrpo.rollout.temperature must be unset: it is an option of verl's own"),
        ({"objective": {"kl_coef": 0.1}}, r"mgrpo.objective.kl_coef must be unset"),
        ({"rollout": {"momentum": 2}}, r"mgrpo.rollout.momentum is now mgrpo.rollout.num_momentum."),
        ({"filter": 3}, r"mgrpo.filter must hold options, got 3"),
        ({"patch_kernels": "yes"}, r"mgrpo.patch_kernels must be true or false, got 'yes'"),
        ({"momentum": {"decay": 2.0}}, r"momentum.decay must be in \[0, 1\], got 2.0"),
        ({"momentum": {"decay": "high"}}, r"momentum.decay must be float, got 'high'"),
        ({"vote": {"pool": "momentum"}, "rollout": {"num_momentum": 0}}, r"--vote.pool momentum needs"),
        (
            {"objective": {"reward": "self-certainty"}},
            r"mgrpo.objective.reward self-certainty cannot be used: verl does not",
        ),
        ({"vote": {"rule": "self-certainty"}}, r"mgrpo.vote.rule self-certainty cannot be used: verl does not"),
        ({"filter": {"score": "source"}}, r"mgrpo.filter.score must be policy, got source"),
        ({"momentum": {"device": "cpu"}}, r"mgrpo.momentum.device must be same, got cpu"),
        ({"monitor": {"on_collapse": "rollback"}}, r"mgrpo.monitor.on_collapse must be warn or stop"),
    ],
)
def test_options_of_ours_are_checked(mgrpo, message):
    with pytest.raises(ConfigError, match=message):
        read_options(make(mgrpo))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("algorithm__adv_estimator", "grpo"),
        ("algorithm__use_kl_in_reward", True),
        ("algorithm__filter_groups__enable", True),
        ("algorithm__rollout_correction__bypass_mode", True),
        ("actor_rollout_ref__actor__strategy", "fsdp"),
        ("actor_rollout_ref__hybrid_engine", False),
        ("actor_rollout_ref__actor__fsdp_config__qat__enable", True),
        ("actor_rollout_ref__model__lora__rank", 8),
        ("reward__reward_model__enable", True),
        ("trainer__v1__sampler__sync_refill_failed_groups", True),
        ("trainer__default_hdfs_dir", "hdfs://x"),
        ("skip__rollout_tq__enable", True),
    ],
)
def test_options_of_verl_that_do_not_go_with_it_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"mgrpo: {name.replace('__', '.')} must be .*, got {value}"):
        read_options(make(**{name: value}))


def test_every_problem_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        read_options(make({"vite": {}}, algorithm__adv_estimator="gae", actor_rollout_ref__actor__strategy="megatron"))
    assert len(caught.value.problems) == 3
