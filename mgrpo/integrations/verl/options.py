"""M-GRPO's options in verl's configuration: one key `mgrpo` with the groups and names of `mgrpo.train`.

Letters: B prompts a step, M policy and N momentum rollouts a prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mgrpo.config import Config, from_dict
from mgrpo.config.renamed import RENAMED
from mgrpo.errors import ConfigError
from mgrpo.inputs import nearest
from mgrpo.integrations.shared import missing_evidence

# Options under `mgrpo.`; all else is verl's own. None stands for every option of the group.
GROUPS: dict[str, tuple[str, ...] | None] = {
    "rollout": ("num_momentum", "truncated"),
    "momentum": None,
    "filter": None,
    "vote": None,
    "answer": None,
    "objective": ("reward", "advantage", "advantage_over"),
    "kernels": None,
    "monitor": (
        *("on_collapse", "window", "top_answer_share", "agreement_drop", "unparseable_share", "length_change"),
        "probe_drop",
    ),
}
PATCH_KERNELS = "patch_kernels"
MODEL = "actor_rollout_ref.model"
# verl's option, its required value, and the reason.
REQUIRED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("algorithm.adv_estimator", ("mgrpo",), "advantages are those of the vote"),
    ("algorithm.use_kl_in_reward", (False,), "rewards are votes; use actor_rollout_ref.actor.use_kl_loss"),
    ("algorithm.filter_groups.enable", (False, None), "groups get credit after all rollouts of a step"),
    ("algorithm.rollout_correction.bypass_mode", (False, None), "the filter needs the policy's entropies"),
    ("actor_rollout_ref.actor.strategy", ("fsdp2",), "the momentum model is shards of FSDP2"),
    ("actor_rollout_ref.hybrid_engine", (True, None), "one engine rolls out both models"),
    ("actor_rollout_ref.actor.fsdp_config.qat.enable", (False, None), "averages are of plain weights"),
    (f"{MODEL}.lora.rank", (0, None), "it is Megatron's; use actor_rollout_ref.model.lora_rank"),
    ("reward.reward_model.enable", (False, None), "rewards are votes"),
    ("trainer.v1.sampler.sync_refill_failed_groups", (False, None), "momentum rollouts are of the same prompts"),
    ("trainer.default_hdfs_dir", (None,), "the momentum model is saved to a local folder"),
    ("skip.rollout_tq.enable", (False, None), "momentum rollouts are made at every step"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """M-GRPO's options within verl."""

    recipe: Config
    """Its groups rollout, momentum, filter, vote, answer, objective, kernels and monitor are used."""
    patch_kernels: bool
    """Whether the workers' log-probs and entropies are computed by mgrpo_kernels."""


def read_options(config: Any, *, total_training_steps: int | None = None) -> Options:
    """Reads and checks `config.mgrpo` and verl's options that M-GRPO needs.

    Args:
        config: verl's whole configuration, or a mapping like it.
        total_training_steps: steps of the run, once verl has counted its data.

    Raises:
        ConfigError: lists all options that are unknown, out of range, verl's own, or contradict another.
    """
    given = _plain(_select(config, "mgrpo")) or {}
    problems = _unknown(given)
    for name, allowed, why in REQUIRED:
        if (value := _select(config, name)) not in allowed:
            problems.append(f"{name} must be {allowed[0]}, got {value}: {why}.")
    if problems:
        raise ConfigError([f"mgrpo: {problem}" for problem in problems])
    actor = "actor_rollout_ref.actor"
    prompts = _select(config, "data.train_batch_size")
    mini, epochs = _select(config, f"{actor}.ppo_mini_batch_size"), _select(config, f"{actor}.ppo_epochs")
    steps = max(total_training_steps or _select(config, "trainer.total_training_steps") or 1, 1)
    minibatches = max(prompts // mini, 1)
    groups = {name: dict(given.get(name) or {}) for name in GROUPS}
    groups["rollout"] |= {
        "num_prompts": prompts,
        "num_policy": _select(config, "actor_rollout_ref.rollout.n"),
        "temperature": float(_select(config, "actor_rollout_ref.rollout.temperature")),
        "max_new_tokens": _select(config, "data.max_response_length"),
    }
    groups["optim"] = {"num_minibatches": minibatches, "num_epochs": epochs}
    recipe = from_dict({"steps": steps, **groups})
    _check(recipe)
    return Options(recipe=recipe, patch_kernels=bool(given.get(PATCH_KERNELS, False)))


def _check(recipe: Config) -> None:
    """Raises ConfigError for options of `mgrpo.train` that the plug-in does not support."""
    problems = missing_evidence(recipe, host="verl")
    if recipe.filter.score == "source":
        problems.append("filter.score must be policy, got source.")
    if recipe.momentum.device != "same":
        problems.append("momentum.device must be same, got cpu; use actor.fsdp_config.param_offload.")
    if recipe.monitor.on_collapse == "rollback":
        problems.append("monitor.on_collapse must be warn or stop, got rollback.")
    if problems:
        raise ConfigError([f"mgrpo: mgrpo.{problem}" for problem in problems])


def _unknown(given: Mapping[str, Any]) -> list[str]:
    """A message for each unknown key of `mgrpo`, with the nearest known one."""
    problems = []
    for group, values in given.items():
        if group == PATCH_KERNELS:
            if not isinstance(values, bool):
                problems.append(f"mgrpo.{PATCH_KERNELS} must be true or false, got {values!r}.")
            continue
        if group not in GROUPS:
            problems.append(f"mgrpo.{group} is not a known key.{_near(group, [*GROUPS, PATCH_KERNELS])}")
            continue
        if not isinstance(values, Mapping):
            problems.append(f"mgrpo.{group} must hold options, got {values!r}.")
            continue
        known = [field.name for field in dataclasses.fields(getattr(Config(), group))]
        for name in values:
            if new := RENAMED.get(f"{group}.{name}"):
                problems.append(f"mgrpo.{group}.{name} is now mgrpo.{new}.")
            elif name not in known:
                problems.append(f"mgrpo.{group}.{name} is not a known key.{_near(name, known)}")
            elif name not in (GROUPS[group] or known):
                problems.append(
                    f"mgrpo.{group}.{name} must be unset: it is an option of verl's own, or not offered there."
                )
    return problems


def _near(name: str, known: list[str]) -> str:
    """Suggests the nearest known name."""
    near = nearest(name, known)
    return f" Did you mean {near}?" if near else ""


def _select(config: Any, dotted: str) -> Any:
    """A value of nested mappings or omegaconf nodes; None where a key is absent."""
    for part in dotted.split("."):
        config = None if config is None else config.get(part, None)
    return config


def _plain(node: Any) -> Any:
    """Nested dicts from omegaconf nodes."""
    if hasattr(node, "items"):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple) or type(node).__name__ == "ListConfig":
        return [_plain(value) for value in node]
    return node
