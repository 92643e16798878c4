"""M-GRPO as a trainer of TRL: `MGRPOTrainer` is used like GRPOTrainer, and needs no reward function.

Letters: P prompts in a generation batch, M policy rollouts (TRL's num_generations) and N momentum rollouts a prompt,
G = M + N, R = P * M rows of the batch over all processes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.nn.utils.rnn import pad_sequence
from trl.trainer import grpo_trainer

import mgrpo_kernels as K
from mgrpo.algorithm.advantage import group_advantage
from mgrpo.algorithm.credit import Credit, assign_credit
from mgrpo.data.keys import ABSENT, look_up, suggest_key
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.extract import make_extractor
from mgrpo.grading.label_text import Label
from mgrpo.grading.thoughts import decode_responses
from mgrpo.integrations.shared import credit_metrics, logged, make_truth_reader
from mgrpo.integrations.trl.adapter import (
    AdapterMomentum,
    add_momentum_adapter,
    base_restored,
    has_momentum_adapter,
)
from mgrpo.integrations.trl.config import MGRPOConfig
from mgrpo.integrations.trl.momentum import MomentumCallback
from mgrpo.integrations.versions import require
from mgrpo.models.save import make_savable, save_model
from mgrpo.observe.collapse import Monitor
from mgrpo.observe.step import mean
from mgrpo.types import Metrics

__all__ = ["MGRPOConfig", "MGRPOTrainer", "MomentumCallback", "majority_vote"]
require("trl")
_GRPOTrainer: Any = grpo_trainer.GRPOTrainer  # its types say that it may have no model
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A trajectory as the processes exchange it."""

    answer: str | None
    entropy: float  # nats, for the filter
    mean_entropy: float  # nats, mean of the tokens
    length: int  # tokens
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class GroupCredit:
    """Credit of all rollouts, computed by the main process and sent to the others."""

    credit: Credit
    metrics: Metrics
    alarms: list[str]


def majority_vote(completions: list[Any], **_: Any) -> list[float]:
    """Placeholder among TRL's reward functions for the vote, which needs the groups of all processes."""
    return [0.0] * len(completions)


class MGRPOTrainer(_GRPOTrainer):
    """GRPOTrainer whose rewards are votes of the policy and of its momentum model on each prompt's answer.

    Each prompt gets `num_generations` rollouts of the policy, which train, and `num_momentum_generations` of the
    momentum model, which vote. Trajectories that the IQR filter drops do neither. After each optimiser step the policy
    is averaged into the momentum model, which is saved in each checkpoint.

    Args:
        model: folder, hub id, or model, as for GRPOTrainer.
        reward_funcs: further rewards, none by default; their weighted sum with the vote's is compared within groups.
            `args.reward_weights` starts with the weight of the vote.
        args: MGRPOConfig.
        kwargs: as for GRPOTrainer; `train_dataset` needs the column `prompt`. A column `answer` is for metrics only.

    Raises:
        ValueError: tools, environments, rollout functions, DeepSpeed or FSDP1, which momentum rollouts do not support;
            an option out of range.

    Source: arXiv 2512.13070, algorithm 1.
    """

    _tag_names = ["trl", "mgrpo"]  # noqa: RUF012
    _name = "M-GRPO"

    def __init__(self, model: Any, reward_funcs: Any = None, args: MGRPOConfig | None = None, **kwargs: Any):
        args = args or MGRPOConfig()
        if not isinstance(args, MGRPOConfig):
            raise ValueError(f"MGRPOTrainer: args must be an MGRPOConfig, got {type(args).__name__}.")
        for name in ("tools", "rollout_func", "environment_factory"):
            if kwargs.get(name):
                raise ValueError(f"MGRPOTrainer: {name} must be None, because momentum rollouts have one turn.")
        others = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []
        super().__init__(model, [majority_vote, *others], args, **kwargs)
        if dropped := make_savable(self.accelerator.unwrap_model(self.model)):
            logger.warning(
                "generation_config is saved without %s: its values contradict one another, and transformers does not "
                "write them.",
                ", ".join(dropped),
            )
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and self._dist.fsdp_version == 1):
            raise ValueError("MGRPOTrainer: training must be on one device, DDP or FSDP2, got DeepSpeed or FSDP1.")
        self.recipe = args.recipe()
        self.extract = make_extractor(args.answer_extract)
        self.read_truth = make_truth_reader(args.answer_label_extract)
        _check_answer_key(args.data_answer_key, kwargs.get("train_dataset"))
        answer = self.recipe.answer
        self.checker = AnswerChecker(mode=answer.equivalence, timeout_s=answer.timeout_s, num_workers=answer.workers)
        num_prompts = self.args.generation_batch_size // self.num_generations
        self.monitor = Monitor(self.recipe.monitor, num_prompts=num_prompts)
        add_momentum_adapter(self.model, self.recipe.momentum)
        self.momentum = MomentumCallback(self.recipe.momentum, seed=args.seed)
        self.add_callback(self.momentum)
        self._momentum_rollouts: tuple[list[list[int]], list[list[int]]] = ([], [])  # token ids of prompts, responses
        self._prompt_ids: list[list[int]] = []
        self._advantage = self._keep = torch.empty(0)  # [R]

    # Rollouts

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Generates with the weights that the model holds now, which a separate engine gets first."""
        if not (self.use_vllm and has_momentum_adapter(self.model)):
            return super()._generate_single_turn(*args, **kwargs)
        with base_restored(self.model):
            return super()._generate_single_turn(*args, **kwargs)

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """Generates momentum rollouts and returns the policy's."""
        self._momentum_rollouts = self.roll_out_momentum(prompts) if self.model.training else ([], [])
        generated = super()._generate(prompts)
        self._prompt_ids = generated[0]
        return generated

    def roll_out_momentum(self, prompts: list[Any]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of prompts and responses of this process's momentum rollouts, in the order of its prompts."""
        first = self.accelerator.process_index * len(prompts)
        rows = [
            row
            for row in range(len(prompts))
            for _ in range(momentum_rollouts_at(first + row, self.num_generations, self.num_momentum))
        ]
        if not rows:
            return [], []
        prompt_ids, images, fields = self._tokenize_prompts(copy.deepcopy([prompts[row] for row in rows]))
        if images or fields:
            raise ValueError("MGRPOTrainer: prompts must be text, got images. Momentum rollouts do not take them.")
        with self.momentum.lent():
            self._last_loaded_step = -1  # makes TRL send these weights to a separate engine
            responses, _ = self._generate_single_turn(prompt_ids, None, {}, self.num_momentum)
        self._last_loaded_step = -1  # makes TRL send the policy's before the next rollouts
        return prompt_ids, responses

    @property
    def num_momentum(self) -> int:
        """N."""
        return self.recipe.rollout.num_momentum

    # Votes

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> torch.Tensor:
        """Rewards of all processes' policy rollouts, [R, functions]; the first is the vote's."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        policy = gather_object(self._describe(self._prompt_ids, completion_ids_list))
        momentum = gather_object(self._describe(*self._momentum_rollouts))
        answers = gather_object([self.read_label(row) for row in inputs])
        own = self.assign_credit(policy, momentum, answers) if self.accelerator.is_main_process else None
        of_groups: Any = broadcast_object_list([own])[0]
        self._take(of_groups)
        credit, num_policy = of_groups.credit, of_groups.credit.num_policy
        rewards[:, 0] = credit.rewards[:, :num_policy].flatten().to(rewards.device)
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1).view(-1, num_policy).cpu()
        keep = credit.keep[:, :num_policy]
        self._keep = keep.flatten()
        self._advantage = group_advantage(total, keep, keep, self.recipe.objective).flatten()
        return rewards

    def read_label(self, row: dict[str, Any]) -> Label | None:
        """The true answer of a row, None where it has none."""
        value = look_up(row, self.args.data_answer_key)
        return None if value is ABSENT else self.read_truth(value)

    def assign_credit(
        self, policy: Sequence[Rollout], momentum: Sequence[Rollout], answers: Sequence[Label | None]
    ) -> GroupCredit:
        """Filter, vote and metrics of whole groups, in the order of the prompts.

        Args:
            policy: R rollouts of the policy, M a prompt.
            momentum: P * N rollouts of the momentum model, N a prompt; none in evaluation.
            answers: R true answers, or None, for metrics alone.

        Raises:
            FloatingPointError: no trajectory has a finite entropy; single ones without are dropped and counted.
        """
        num_policy = self.num_generations if self.model.training else self.num_generations_eval
        num_prompts = len(policy) // num_policy
        num_momentum = len(momentum) // num_prompts
        groups = [
            [*policy[b * num_policy :][:num_policy], *momentum[b * num_momentum :][:num_momentum]]
            for b in range(num_prompts)
        ]

        def values(name: str) -> Any:
            return [[getattr(rollout, name) for rollout in group] for group in groups]

        c, entropy = self.recipe, torch.tensor(values("entropy"))
        if not entropy.isfinite().any():
            raise FloatingPointError(
                "MGRPOTrainer: the policy's logits must be finite, none is. Resume from an earlier checkpoint."
            )
        credit = assign_credit(
            values("answer"),
            entropy,
            num_policy,
            filter=c.filter,
            vote=c.vote if num_momentum else replace(c.vote, pool="policy"),
            objective=c.objective,
            checker=self.checker,
        )
        metrics = credit_metrics(
            credit,
            lengths=torch.tensor(values("length")),
            truncated=torch.tensor(values("truncated")),
            entropy=torch.tensor(values("mean_entropy")),
            true_answers=answers[::num_policy],
            checker=self.checker,
        )
        metrics |= {"step": self.state.global_step + 1, "nonfinite_share": mean(~entropy.isfinite())}
        alarms = self.monitor.observe(metrics) if self.model.training else []
        return GroupCredit(credit=credit, metrics=metrics, alarms=alarms)

    def _take(self, credit: GroupCredit) -> None:
        """Logs the metrics and handles alarms."""
        mode = "train" if self.model.training else "eval"
        for name, value in logged(credit.metrics).items():
            self._metrics[mode][name].append(value)
        if not credit.alarms:
            return
        if self.accelerator.is_main_process:
            logger.warning("step %d: %s", credit.metrics["step"], "; ".join(credit.alarms))
        if self.args.monitor_on_collapse == "stop":
            self.control.should_training_stop = True

    @torch.no_grad()
    def _describe(self, prompts: list[list[int]], responses: list[list[int]]) -> list[Rollout]:
        """Answers of this process's trajectories, given as token ids, and their entropies under the policy."""
        if not prompts:
            return []
        device, pad_id = self.accelerator.device, self._tokenizer.pad_token_id
        texts = decode_responses(self._tokenizer, prompts, responses)
        prompt_ids, prompt_mask = _pad(prompts, pad_id, "left", device)
        response_ids, response_mask = _pad(responses, pad_id, "right", device)
        _, entropy, _ = self._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([prompt_ids, response_ids], 1),
            torch.cat([prompt_mask, response_mask], 1),
            response_ids.shape[1],
            batch_size=self.args.per_device_train_batch_size,
            compute_entropy=True,
        )
        mask = response_mask.bool()
        means = K.trajectory_entropy(entropy.float(), mask=mask)
        entropies = means if self.recipe.filter.entropy == "mean" else means * mask.sum(1)
        ends = {*self.eos_token_ids, pad_id}
        return [
            Rollout(
                answer=self.extract(text),
                entropy=value,
                mean_entropy=average,
                length=len(response),
                truncated=response[-1] not in ends,
            )
            for text, value, average, response in zip(texts, entropies.tolist(), means.tolist(), responses, strict=True)
        ]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with our advantages, without the trajectories that the filter dropped."""
        output = super()._generate_and_score_completions(inputs)
        rows = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        device = output["advantages"].device
        output["advantages"] = self._advantage[rows].to(device)
        output["completion_mask"] = output["completion_mask"] * self._keep[rows, None].to(device)
        trained = output["completion_mask"] * output.get("tool_mask", 1)
        output["num_items_in_batch"] = self.accelerator.gather(trained.sum()).sum()
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(self._advantage))):
            logged.pop()
        logged.extend(self._advantage.tolist())
        return output

    # State

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Saves the momentum model first, so that every checkpoint with a trainer state has one."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        self.momentum.save(folder, is_main=self.args.should_save)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Loads the policy's adapter too, which transformers forgets where another lies in a folder beside it."""
        super()._load_from_checkpoint(checkpoint, model)
        if has_momentum_adapter(self.model) and not self.is_fsdp_enabled:
            self.model.load_adapter(checkpoint, self.model.active_adapter, is_trainable=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads the momentum model too."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.momentum.load(Path(checkpoint), self.accelerator.unwrap_model(self.model_wrapped))

    def save_momentum_model(self, folder: str | Path) -> None:
        """Writes the momentum model, or adapter, and the tokenizer for `from_pretrained`; every rank must call it."""
        if isinstance(adapter := self.momentum.started, AdapterMomentum):
            adapter.save(Path(folder), is_main=self.args.should_save)
            if self.args.should_save:
                self.processing_class.save_pretrained(folder)
            return
        weights = self.momentum.full_state_dict()
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model_wrapped)
            save_model(Path(folder), model, weights, self.processing_class)


def _check_answer_key(key: str, dataset: Any) -> None:
    """Raises ValueError if a key other than the default names no column."""
    columns = getattr(dataset, "column_names", None)
    parts = key.split(".")
    known = isinstance(columns, list) and any(".".join(parts[:i]) in columns for i in range(1, len(parts) + 1))
    if key != "answer" and isinstance(columns, list) and not known:
        raise ValueError(
            f"MGRPOTrainer: data_answer_key must name a column, got {key!r}. Columns are {', '.join(columns)}."
            f"{suggest_key(key, columns)}"
        )


def momentum_rollouts_at(row: int, num_policy: int, num_momentum: int) -> int:
    """Number of a prompt's N momentum rollouts that belong to row `row` of its M policy rollouts.

    They are spread evenly over the M rows of a group, so that processes which share a group have the same number.
    """
    place = row % num_policy
    return sum(i * num_policy // num_momentum == place for i in range(num_momentum))


def _pad(rows: list[list[int]], pad_id: int, side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [rows, longest]."""
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    padded = pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side)
    return padded.to(device), mask.to(device)
