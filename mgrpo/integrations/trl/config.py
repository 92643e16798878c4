"""Options of MGRPOTrainer beside those of TRL's GRPOConfig."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from mgrpo.config import Config, from_dict
from mgrpo.errors import ConfigError
from mgrpo.integrations.shared import missing_evidence

ADVANTAGE = {"group": "std", "none": "mean"}  # by scale_rewards


def _option(default: Any, text: str) -> Any:
    """A field with its help text for transformers' command-line parser."""
    return field(default=default, metadata={"help": text})


@dataclass
class MGRPOConfig(GRPOConfig):
    """GRPOConfig, of which `num_generations` are the policy's rollouts, with the options of M-GRPO.

    Names are those of `python -m mgrpo.train`, with `_` for the dot; docs/algorithm.md explains each choice.
    """

    num_momentum_generations: int = _option(4, "Rollouts a prompt from the momentum model, which vote only.")
    momentum_decay: float = _option(0.99, "Share of the old momentum weights kept at an update.")
    momentum_schedule: str = _option("constant", "constant, or cosine from momentum_decay to momentum_final_decay.")
    momentum_final_decay: float = _option(0.9999, "Decay at the end of the cosine schedule.")
    momentum_every: int = _option(1, "Optimiser steps between updates of the momentum model.")
    momentum_dtype: str = _option("fp32", "Storage of the momentum model: fp32, bf16-stochastic or bf16-kahan.")
    momentum_device: str = _option("same", "Where the momentum model lives: same, or cpu.")
    filter_k: float = _option(0.75, "Drops trajectories with entropy below Q1 - k (Q3 - Q1).")
    filter_scope: str = _option("batch", "Quartiles over the generation batch, or over each prompt's rollouts.")
    filter_applies_to: str = _option(
        "vote-and-loss", "Excludes dropped trajectories from: vote-and-loss, loss or none."
    )
    filter_two_sided: bool = _option(False, "Also drop above Q3 + k (Q3 - Q1).")
    filter_entropy: str = _option("mean", "Entropy of a trajectory: mean or sum of its tokens'.")
    vote_rule: str = _option("majority", "Rule that elects the pseudo-label: a vote rule of mgrpo.train.")
    vote_pool: str = _option("both", "Models whose rollouts vote: both, policy or momentum.")
    vote_momentum_weight: int = _option(1, "Votes of one momentum rollout.")
    vote_min_share: float = _option(0.0, "A winner with a smaller share of the votes gives no signal.")
    vote_min_margin: float = _option(0.0, "A winner that leads by a smaller share gives no signal.")
    objective_reward: str = _option("majority", "1 for the majority's answer (majority), or its share (soft).")
    answer_extract: str = _option("boxed", "Form of an answer: boxed, hash, last-number or regex:PATTERN.")
    answer_label_extract: str = _option(
        "auto", "Form of the true answer in a label: auto, plain, boxed, hash, last-number or regex:PATTERN."
    )
    answer_equivalence: str = _option("math", "Comparison of answers: math (math-verify) or exact.")
    answer_timeout_s: float = _option(5.0, "Limit of one comparison in seconds of CPU time.")
    answer_workers: int | None = _option(None, "Processes that compare answers; None is one for each core, at most 8.")
    data_answer_key: str = _option("answer", "Column of true answers, for metrics only; a.b is key b in column a.")
    monitor_on_collapse: str = _option("warn", "Action at an alarm of the collapse monitor: warn or stop.")

    def __post_init__(self) -> None:
        """Raises ValueError with all options that are out of range or contradict another."""
        super().__post_init__()
        choices = {
            "scale_rewards": tuple(ADVANTAGE),
            "monitor_on_collapse": ("warn", "stop"),
            "objective_reward": ("majority", "soft"),
        }
        given = {name: getattr(self, name) for name in choices}
        problems = [f"{n} must be one of {choices[n]}, got {v!r}." for n, v in given.items() if v not in choices[n]]
        try:
            refused = missing_evidence(self.recipe(), host="TRL")
        except ConfigError as error:
            refused = error.problems
        problems += [_FLAG.sub(_as_field, problem) for problem in refused]
        assert self.steps_per_generation and self.num_generations  # filled in by TRL
        rows = self.per_device_train_batch_size * self.steps_per_generation
        if rows * self.num_momentum_generations % self.num_generations:
            problems.append(
                "every process must have whole momentum rollouts: per_device_train_batch_size * steps_per_generation "
                f"* num_momentum_generations = {rows * self.num_momentum_generations} must be a multiple of "
                f"num_generations = {self.num_generations}."
            )
        if problems:
            raise ValueError("\n".join(f"MGRPOConfig: {problem.removeprefix('config: ')}" for problem in problems))

    def recipe(self) -> Config:
        """The options as a configuration of `mgrpo.train`, whose other groups have no effect."""

        def group(prefix: str) -> dict[str, Any]:
            names = (name for name in MGRPOConfig.__annotations__ if name.startswith(prefix))
            return {name.removeprefix(prefix): getattr(self, name) for name in names}

        return from_dict(
            {
                "rollout": {
                    "num_policy": self.num_generations,
                    "num_momentum": self.num_momentum_generations,
                    "temperature": self.temperature,
                    "max_new_tokens": self.max_completion_length,
                },
                "objective": group("objective_") | {"advantage": ADVANTAGE.get(str(self.scale_rewards), "std")},
                **{name: group(f"{name}_") for name in ("momentum", "filter", "vote", "answer", "data", "monitor")},
            }
        )


_FLAG = re.compile(r"(?:--)?\b([a-z]+)\.([a-z_-]+)")
_TRL_NAMES = {
    "rollout_num_momentum": "num_momentum_generations",
    "rollout_num_policy": "num_generations",
    "rollout_temperature": "temperature",
    "rollout_max_new_tokens": "max_completion_length",
}


def _as_field(match: re.Match[str]) -> str:
    """`--filter.k` as `filter_k`, and rollouts by TRL's names."""
    name = f"{match[1]}_{match[2]}".replace("-", "_")
    return _TRL_NAMES.get(name, name)
