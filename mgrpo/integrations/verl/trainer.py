"""verl's trainer mode `mgrpo`: votes of the policy and of its momentum model in place of rewards.

Letters: R rows (trajectories), L response tokens, B prompts, M policy and N momentum rollouts a prompt.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
import transfer_queue as tq  # pyright: ignore[reportMissingImports]
from omegaconf import open_dict  # pyright: ignore[reportMissingImports]
from verl.trainer.ppo.padding_utils import (  # pyright: ignore[reportMissingImports]
    upsample_batch_to_divisible_size,
)
from verl.trainer.ppo.utils import Role  # pyright: ignore[reportMissingImports]
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer  # pyright: ignore[reportMissingImports]
from verl.utils import tensordict_utils as tu  # pyright: ignore[reportMissingImports]
from verl.utils.debug import marked_timer  # pyright: ignore[reportMissingImports]

from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.extract import make_extractor
from mgrpo.integrations.shared import logged
from mgrpo.integrations.verl import plugin
from mgrpo.integrations.verl.groups import MOMENTUM, GroupCredit, credit_rows, merge_rows
from mgrpo.integrations.verl.options import read_options
from mgrpo.integrations.verl.queue import fetch
from mgrpo.observe.collapse import Monitor

logger = logging.getLogger(__name__)
ACTORS = (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef)


@register_trainer("mgrpo")
class MGRPOTrainer(PPOTrainerSync):
    """verl's synchronous trainer whose rewards are majority votes, without labels.

    `actor_rollout_ref.rollout.n` is M. At each step the engine generates M responses a prompt with the policy's weights
    and then N = `mgrpo.rollout.num_momentum` with the momentum model's. The log-probs of all of them are the policy's.
    Trajectories that the IQR filter drops neither vote nor train, and momentum rollouts only vote.

    Args:
        config: verl's configuration, with the key `mgrpo`.

    Raises:
        ConfigError: unsupported options of verl, or options of ours out of range.

    Source: arXiv 2512.13070, algorithm 1.
    """

    def __init__(self, config: Any):
        plugin.check_processes([plugin.describe()])
        self.options = read_options(config)
        self.recipe = self.options.recipe
        super().__init__(config)
        answer = self.recipe.answer
        self.extract = make_extractor(answer.extract)
        self.checker = AnswerChecker(mode=answer.equivalence, timeout_s=answer.timeout_s, num_workers=answer.workers)
        self.monitor = Monitor(self.recipe.monitor, num_prompts=self.recipe.rollout.num_prompts)
        self._prompts: list[Any] = []  # of this step
        self._momentum_batch: Any = None  # KVBatchMeta
        self._stop = False

    @property
    def trainer_mode(self) -> str:
        """The mode of the same data flow, whose name verl compares in many places."""
        return "sync"

    @trainer_mode.setter
    def trainer_mode(self, name: str) -> None:
        """Ignores the registered name, which verl sets."""

    # Workers

    def _init_resource_pool_mgr(self) -> None:
        """Verl's roles with our worker as the actor."""
        super()._init_resource_pool_mgr()
        # Not at the top, where it would be an import cycle in a worker process.
        worker = importlib.import_module("mgrpo.integrations.verl.worker").MGRPOWorker
        for role in set(self.role_worker_mapping) & set(ACTORS):
            self.role_worker_mapping[role] = ray.remote(worker)
        self.options = read_options(self.config, total_training_steps=self.total_training_steps)
        with open_dict(self.config):
            self.config.actor_rollout_ref.mgrpo = {
                "momentum": dataclasses.asdict(self.recipe.momentum),
                "kernels": dataclasses.asdict(self.recipe.kernels),
                "patch_kernels": self.options.patch_kernels,
                "num_optimizer_steps": self.options.recipe.num_optimizer_steps,
                "seed": self.config.actor_rollout_ref.actor.data_loader_seed,
            }

    def on_init_end(self) -> None:
        """Checks every worker before the first rollout."""
        plugin.check_processes(self.actor_rollout_wg.describe_plugin())
        super().on_init_end()

    # Rollouts

    def _submit_batch_to_rollout(self, batch: Any) -> int:
        """Keeps the prompts for the momentum model."""
        self._prompts.append(batch)
        return super()._submit_batch_to_rollout(batch)

    def on_sample_end(self) -> None:
        """Generates the momentum rollouts after the policy's."""
        prompts, self._prompts = self._prompts, []
        self._momentum_batch = None
        if self.recipe.rollout.num_momentum:
            with marked_timer("gen_momentum", self.timing_raw, color="red"):
                self.checkpoint_manager.sleep_replicas()
                ray.get(self.actor_rollout_wg.update_momentum_weights(global_steps=self.global_steps - 1))
                self._momentum_batch = self.roll_out_momentum(prompts)
        super().on_sample_end()

    def roll_out_momentum(self, prompts: list[Any]) -> Any:
        """Generates N responses to each prompt with the engine's current weights; returns their KVBatchMeta."""
        batch = momentum_prompts(prompts, self.recipe.rollout.num_momentum)
        super()._submit_batch_to_rollout(batch)
        rollouts, _ = self.replay_buffer.sample(
            global_steps=self.global_steps, partition_id="train", batch_size=len(batch)
        )
        return rollouts

    # Votes

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """Computes log-probs and entropies of both models' rollouts; the momentum rollouts need only the entropies."""
        batch = super()._compute_old_log_prob(batch, metrics)
        if self._momentum_batch is not None:
            processes = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
            padded = upsample_batch_to_divisible_size(self._momentum_batch, processes, self.tokenizer.eos_token_id)
            self._momentum_batch = super()._compute_old_log_prob(padded, {})
        return batch

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """Votes, and replaces rewards, masks and advantages."""
        limit, parts = self.recipe.rollout.max_new_tokens, (batch, self._momentum_batch)
        fetched = [fetch(part, self.tokenizer, limit) for part in parts if part is not None]
        credit = credit_rows(
            merge_rows([part.rows for part in fetched]),
            self.recipe,
            extract=self.extract,
            checker=self.checker,
            backend=self.recipe.kernels.backend,
        )
        policy = fetched[0]
        policy.write_rewards(credit)
        batch = super()._compute_advantage(batch, metrics)
        # The estimator lacks the momentum rollouts, which objective.advantage_over all needs.
        policy.write_advantages(credit)
        if self._momentum_batch is not None:
            tq.kv_clear(keys=self._momentum_batch.keys, partition_id=self._momentum_batch.partition_id)
            self._momentum_batch = None
        self._observe(credit, metrics)
        return batch

    def _observe(self, credit: GroupCredit, metrics: dict[str, Any]) -> None:
        """Logs the step and handles alarms."""
        found = credit.metrics | {"step": self.global_steps}
        alarms = self.monitor.observe(found)
        metrics |= logged(found) | {"mgrpo/alarms": float(len(alarms))}
        if alarms:
            logger.warning("mgrpo: step %d: %s", self.global_steps, "; ".join(alarms))
            self._stop = self.recipe.monitor.on_collapse == "stop"

    def on_step_end(self) -> None:
        """Updates the engine with the policy; after an alarm that stops the run, saves a checkpoint and ends it."""
        super().on_step_end()
        if self._stop:
            self._save_checkpoint()
            self.total_training_steps = self.global_steps


def momentum_prompts(prompts: list[Any], num_momentum: int) -> Any:
    """The prompts under separate keys, with N rollouts each, as a TensorDict for the agent loop."""
    batch = tu.concat_tensordict(prompts) if len(prompts) > 1 else prompts[0]
    batch = batch.clone(recurse=False)
    tu.assign_non_tensor_stack(batch, "uid", [f"{uid}{MOMENTUM}" for uid in batch["uid"]])
    tu.assign_non_tensor_data(batch, "__rollout_n__", num_momentum)
    return batch
