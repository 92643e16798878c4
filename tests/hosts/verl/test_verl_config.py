"""The configuration as stock verl's own entry point composes it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from omegaconf import OmegaConf
from small_verl import CONFIG, environment
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.config import validate_config

from mgrpo.config import Config
from mgrpo.errors import ConfigError
from mgrpo.integrations.verl.options import GROUPS, read_options
from mgrpo.integrations.verl.trainer import MGRPOTrainer


def test_the_named_configuration_is_stock_verls_with_our_trainer(compose):
    config = compose("actor_rollout_ref.actor.use_kl_loss=true", mgrpo__filter__k=2, mgrpo__vote__pool="momentum")
    assert get_trainer_cls(config.trainer.v1.trainer_mode) is MGRPOTrainer and config.trainer.use_v1
    validate_config(config, need_reference_policy(config), need_critic(config))
    assert not need_critic(config) and need_reference_policy(config)
    options = read_options(config, total_training_steps=4)
    assert options.recipe.filter.k == 2.0 and options.recipe.vote.pool == "momentum"
    assert (options.recipe.rollout.num_policy, options.recipe.rollout.num_momentum) == (4, 2)
    assert options.recipe.num_optimizer_steps == 4 * 2
    kwargs = config.reward.custom_reward_function.reward_kwargs
    expected = {"extract": r"regex:#(\d\d)", "label_extract": "auto", "equivalence": "exact"}
    assert OmegaConf.to_container(kwargs, resolve=True) == expected


def test_every_option_stands_in_the_configuration_with_the_default_of_the_trainer(compose):
    listed = OmegaConf.to_container(compose("mgrpo.rollout.num_momentum=4", "mgrpo.answer.extract=boxed").mgrpo)
    listed["answer"]["equivalence"] = "math"
    defaults = dataclasses.asdict(Config())
    wanted = {
        group: {name: value for name, value in defaults[group].items() if names is None or name in names}
        for group, names in GROUPS.items()
    }
    assert listed == {**wanted, "patch_kernels": False}


def test_stock_configuration_takes_the_options_with_a_plus():
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra_compose(
            "ppo_trainer",
            overrides=[
                "trainer.v1.trainer_mode=mgrpo",
                "algorithm.adv_estimator=mgrpo",
                "actor_rollout_ref.actor.strategy=fsdp2",
                "actor_rollout_ref.rollout.n=12",
                "+mgrpo.rollout.num_momentum=3",
                "+mgrpo.momentum.decay=0.999",
            ],
        )
    options = read_options(config)
    assert (options.recipe.rollout.num_momentum, options.recipe.momentum.decay) == (3, 0.999)
    assert (options.recipe.rollout.num_policy, options.recipe.rollout.num_prompts) == (12, config.data.train_batch_size)


def test_the_trainer_refuses_what_does_not_go_with_it_before_anything_starts(compose):
    with pytest.raises(ConfigError, match=r"actor_rollout_ref.actor.strategy must be fsdp2, got fsdp"):
        MGRPOTrainer(compose(actor_rollout_ref__actor__strategy="fsdp"))


def test_verls_command_line_composes_it(tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "verl.trainer.main_ppo", *CONFIG, "--cfg", "job"],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment(tmp_path),
    )
    assert "trainer_mode: mgrpo" in result.stdout, result.stderr
