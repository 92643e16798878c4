"""What of verl the plug-in overrides, replaces or calls, one named test each: a change of verl fails here."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import transfer_queue as tq
import verl.trainer.ppo.v1.trainer_base as trainer_base
from verl.checkpoint_engine import CheckpointEngineManager
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo import core_algos, padding_utils
from verl.trainer.ppo.v1 import PPOTrainerSync, get_trainer_cls
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils import tensordict_utils as tu
from verl.utils import torch_functional
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils import padding

from mgrpo.integrations.verl.trainer import MGRPOTrainer
from mgrpo.integrations.verl.worker import MGRPOWorker


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


OVERRIDDEN = {
    (PPOTrainerSync, MGRPOTrainer): {
        "__init__": ["self", "config"],
        "_init_resource_pool_mgr": ["self"],
        "on_init_end": ["self"],
        "_submit_batch_to_rollout": ["self", "batch"],
        "on_sample_end": ["self"],
        "_compute_old_log_prob": ["self", "batch", "metrics"],
        "_compute_advantage": ["self", "batch", "metrics"],
        "on_step_end": ["self"],
    },
    (ActorRolloutRefWorker, MGRPOWorker): {
        "init_model": ["self"],
        "save_checkpoint": ["self", "local_path", "hdfs_path", "global_step", "max_ckpt_to_keep"],
        "load_checkpoint": ["self", "local_path", "hdfs_path", "del_local_after_load"],
    },
}


@pytest.mark.parametrize(
    ("stock", "ours", "name", "expected"),
    [(stock, ours, name, p) for (stock, ours), hooks in OVERRIDDEN.items() for name, p in hooks.items()],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_overridden(stock, ours, name, expected):
    assert parameters(getattr(stock, name)) == expected == parameters(getattr(ours, name))
    assert getattr(ours, name) is not getattr(stock, name)


CALLED = {
    "TransferQueue.kv_batch_get": (tq.kv_batch_get, ["keys", "partition_id", "select_fields"]),
    "TransferQueue.kv_batch_put": (tq.kv_batch_put, ["keys", "partition_id", "fields", "tags"]),
    "TransferQueue.kv_clear": (tq.kv_clear, ["keys", "partition_id"]),
    "ReplayBuffer.sample": (ReplayBuffer.sample, ["self", "global_steps", "partition_id", "batch_size"]),
    "CheckpointEngineManager.sleep_replicas": (CheckpointEngineManager.sleep_replicas, ["self"]),
    "PPOTrainer._save_checkpoint": (PPOTrainerSync._save_checkpoint, ["self"]),
    "upsample_batch_to_divisible_size": (
        padding_utils.upsample_batch_to_divisible_size,
        ["batch", "batch_multiple", "eos_token_id"],
    ),
    "assign_non_tensor_stack": (tu.assign_non_tensor_stack, ["tensor_dict", "key", "val"]),
    "assign_non_tensor_data": (tu.assign_non_tensor_data, ["tensor_dict", "key", "val"]),
    "concat_tensordict": (tu.concat_tensordict, ["data"]),
    "response_to_nested": (padding.response_to_nested, ["tensor", "response_mask"]),
    "register_trainer": (trainer_base.register_trainer, ["name"]),
    "register_adv_est": (core_algos.register_adv_est, ["name_or_enum"]),
    "ActorRolloutRefWorker.update_weights": (ActorRolloutRefWorker.update_weights, ["self", "global_steps", "mode"]),
    "FSDPEngine.optimizer_step": (FSDPEngine.optimizer_step, ["self"]),
    "logprobs_from_logits": (torch_functional.logprobs_from_logits, ["logits", "labels", "inplace_backward"]),
    "entropy_from_logits": (torch_functional.entropy_from_logits, ["logits"]),
    "entropy_from_logits_with_chunking": (
        torch_functional.entropy_from_logits_with_chunking,
        ["logits", "chunk_size"],
    ),
    "FusedLinearForPPO.forward": (
        FusedLinearForPPO.forward,
        ["self", "hidden_states", "vocab_weights", "input_ids", "temperature"],
    ),
    "LinearCrossEntropy.forward": (
        LinearCrossEntropy.forward,
        ["ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"],
    ),
}


@pytest.mark.parametrize("name", CALLED)
def test_called(name):
    function, expected = CALLED[name]
    found = parameters(function)
    assert found[: len(expected)] == expected if name.startswith("TransferQueue.kv_batch_put") else found == expected


def test_update_weights_is_a_coroutine_whose_engine_sleeps_before():
    assert inspect.iscoroutinefunction(ActorRolloutRefWorker.update_weights)
    assert inspect.iscoroutinefunction(MGRPOWorker.update_momentum_weights)


@pytest.mark.parametrize(
    "name", ["describe_plugin", "init_model", "update_momentum_weights", "save_checkpoint", "load_checkpoint"]
)
def test_methods_of_the_worker_are_registered_for_all_ranks_as_verls_are(name):
    decorator = importlib.import_module("verl.single_controller.base.decorator")
    attributes = getattr(getattr(MGRPOWorker, name), decorator.MAGIC_ATTR)
    assert attributes["dispatch_mode"] == decorator.Dispatch.ONE_TO_ALL
    stock = {"update_momentum_weights": "update_weights", "describe_plugin": "init_model"}.get(name, name)
    assert attributes == getattr(getattr(ActorRolloutRefWorker, stock), decorator.MAGIC_ATTR)


def test_the_trainer_mode_and_the_estimator_are_registered_under_their_names():
    assert get_trainer_cls("mgrpo") is MGRPOTrainer
    assert core_algos.get_adv_estimator_fn("mgrpo").__module__ == "mgrpo.integrations.verl.advantage"
    with pytest.raises(ValueError, match="Unknown trainer 'mgrp'"):
        get_trainer_cls("mgrp")


def test_the_entry_point_takes_the_trainer_from_the_registry():
    source = inspect.getsource(TaskRunnerV1.__ray_metadata__.modified_class.run)
    assert "get_trainer_cls(config.trainer.v1.trainer_mode)" in source


def test_a_step_of_verl_calls_the_hooks_in_the_order_that_the_vote_needs():
    source = inspect.getsource(PPOTrainerSync._step_once)
    calls = [
        *("self.replay_buffer.sample(", "self.on_sample_end()", "self._balance_batch(", "self._compute_old_log_prob("),
        *("self._compute_ref_log_prob(", "self._compute_advantage(", "self._update_actor("),
    ]
    places = [source.index(call) for call in calls]
    assert places == sorted(places)


def test_the_mode_by_which_verl_chooses_its_data_flow_is_the_synchronous_one():
    assert isinstance(inspect.getattr_static(MGRPOTrainer, "trainer_mode"), property)
    assert 'self.trainer_mode == "sync"' in inspect.getsource(PPOTrainerSync._build_replay_buffer)
    assert "self.trainer_mode = self.config.trainer.v1.trainer_mode" in inspect.getsource(PPOTrainerSync.__init__)


def test_verls_loss_takes_its_tokens_and_their_number_from_the_masks_that_are_written():
    losses = importlib.import_module("verl.workers.utils.losses")
    assert 'data["response_mask"]' in inspect.getsource(losses.ppo_loss)
    assert 'data["loss_mask"].sum()' in inspect.getsource(FSDPEngine.forward_backward_batch)
