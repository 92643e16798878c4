"""Every metric of a step: its label, its better end and its plots.

A metric is added as a row of METRICS; logging a key without a row fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """The label and the presentation of one metric."""

    label: str  # with its unit
    better: Literal["more", "less"] | None = None
    panels: Mapping[str, str] = MappingProxyType({})  # keys of PANELS that draw it, each with its label there
    always: bool = False  # in every row, null if not applicable
    summary: bool = False  # in the report's table


class Panel(NamedTuple):
    """One pair of axes, shared by its metrics."""

    figure: str
    title: str
    share: bool = False  # values in [0, 1]
    log: bool = False


FIGURES = {
    "reward": "Reward against accuracy: a reward that rises while accuracy falls is collapse",
    "entropy": "Entropy",
    "answers": "Concentration of answers",
    "lengths": "Lengths of responses",
    "signal": "Prompts and rollouts without signal",
    "momentum": "Policy against momentum",
    "time": "Time of a step",
    "optimisation": "Optimisation",
}
PANELS = {
    "reward": Panel("reward", "share", share=True),
    "entropy": Panel("entropy", "nats a token"),
    "answers": Panel("answers", "share of rollouts", share=True),
    "distinct": Panel("answers", "answers a prompt"),
    "lengths": Panel("lengths", "tokens"),
    "truncated": Panel("lengths", "share of rollouts", share=True),
    "signal": Panel("signal", "share", share=True),
    "agreement": Panel("momentum", "share of prompts", share=True),
    "entropies": Panel("momentum", "entropy, nats"),
    "top_answers": Panel("momentum", "share of the most common answer", share=True),
    "unparseable": Panel("momentum", "share without answer", share=True),
    "both_lengths": Panel("momentum", "length, tokens"),
    "step": Panel("time", "seconds a step"),
    "throughput": Panel("time", "tokens a second"),
    "loss": Panel("optimisation", "loss"),
    "grad_norm": Panel("optimisation", "gradient norm", log=True),
    "kl": Panel("optimisation", "KL, nats a token"),
    "lr": Panel("optimisation", "learning rate"),
}


SOURCES = ("policy", "momentum")
PHASES = ("rollout", "rollout_policy", "rollout_momentum", "publish", "score", "vote", "update", "ema", "monitor")
PHASES += ("checkpoint", "eval")
_SUMMARY = {"always": True, "summary": True}


def _pair(key: str, label: str, panel: str) -> dict[str, Metric]:
    """A metric of the policy's rollouts and of the momentum model's."""
    return {f"{key}_{source}": Metric(f"{label}, {source}", None, {panel: source}) for source in SOURCES}


def _eval(source: str) -> dict[str, Metric]:
    """Metrics of one model on the eval set."""
    name = f"eval accuracy, {source}"
    return {
        f"probe_accuracy_{source}": Metric(
            name, "more", {"reward": name, "agreement": name}, always=True, summary=True
        ),
        f"probe_greedy_{source}": Metric(f"{name}, greedy", "more", summary=True),
        f"probe_majority_{source}": Metric(f"{name}, of the majority", "more"),
        f"probe_pass_{source}": Metric(f"{name}, of any sample", "more"),
    }


METRICS: dict[str, Metric] = {
    "step": Metric("step", always=True),
    "reward_mean": Metric("reward", "more", {"reward": "reward"}, **_SUMMARY),
    "reward_mean_momentum": Metric("reward, momentum", "more"),
    "majority_share": Metric("vote share of the pseudo-label", None, {"reward": "vote share of the label"}, **_SUMMARY),
    "vote_accuracy": Metric("vote accuracy", "more", {"reward": "vote accuracy"}, **_SUMMARY),
    "vote_agreement": Metric("policy-momentum vote agreement", "more", {"agreement": "majorities agree"}, **_SUMMARY),
    **_eval("policy"),
    **_eval("momentum"),
    "retention": Metric("share of the remembered answers that are unchanged", "more", always=True),
    "top_answer": Metric("most common answer"),
    "top_answer_share": Metric(
        "most common answer, share of rollouts", "less", {"answers": "most common answer of all prompts"}, **_SUMMARY
    ),
    **_pair("top_answer_share", "most common answer, share of rollouts", "top_answers"),
    "distinct_answers": Metric("distinct answers a prompt", None, {"distinct": "distinct answers"}, **_SUMMARY),
    "token_entropy": Metric("token entropy, nats", None, {"entropy": "token entropy"}, **_SUMMARY),
    **_pair("token_entropy", "token entropy, nats", "entropies"),
    "response_length": Metric("response length, tokens", None, {"lengths": "all"}, **_SUMMARY),
    **_pair("response_length", "response length, tokens", "both_lengths"),
    "kept_length": Metric("length of kept rollouts, tokens", None, {"lengths": "kept"}, always=True),
    "pruned_length": Metric(
        "length of pruned rollouts, tokens", None, {"lengths": "pruned by the filter"}, always=True
    ),
    "pruned_share": Metric("pruned by the filter", None, {"signal": "rollouts pruned by the filter"}, **_SUMMARY),
    "zero_signal_share": Metric("prompts without signal", "less", {"signal": "prompts without signal"}, **_SUMMARY),
    "no_signal_share": Metric("prompts whose vote has no signal", "less"),
    "tie_share": Metric("prompts with a tie", "less", {"signal": "prompts with a tie"}, always=True),
    "unparseable_share": Metric("without answer", "less", {"signal": "rollouts without answer"}, **_SUMMARY),
    **_pair("unparseable_share", "without answer", "unparseable"),
    "truncated_share": Metric("truncated", "less", {"truncated": "cut at the length limit"}, **_SUMMARY),
    "kl": Metric("KL to the reference", None, {"kl": "to the reference"}, **_SUMMARY),
    "kl_initial": Metric("KL to the initial model", None, {"kl": "to the initial model"}, always=True),
    "loss": Metric("loss", None, {"loss": "loss"}, **_SUMMARY),
    "grad_norm": Metric("gradient norm", None, {"grad_norm": "before clipping"}, **_SUMMARY),
    "lr": Metric("learning rate", None, {"lr": "learning rate"}, always=True),
    "trained_parameters": Metric("trained parameters, of LoRA"),
    "ratio_mean": Metric("mean importance ratio"),
    "clip_low_share": Metric("share of tokens at the lower clip"),
    "clip_high_share": Metric("share of tokens at the upper clip"),
    "tis_mean": Metric("mean truncated importance weight", always=True),
    "tis_clipped_share": Metric("share of tokens at the cap of the importance weight", "less", always=True),
    "rollout_age": Metric("optimiser steps between the policy that generated and the one that trains", always=True),
    "logprob_gap": Metric("log-probs of engine and trainer, mean difference, nats", "less", always=True),
    "parity_policy": Metric("log-probs of the engine, policy, mean difference, nats", "less"),
    "parity_momentum": Metric("log-probs of the engine, momentum, mean difference, nats", "less"),
    "nonfinite_steps": Metric("non-finite optimiser steps", "less", always=True),
    "rollbacks": Metric("rollbacks", "less", always=True),
    "alarm": Metric("alarms of the collapse monitor", always=True),
    "kv_cache_usage": Metric("largest share of the KV cache in use"),
    "redrawn": Metric("rollouts that vLLM generated again", "less"),
    "tokens_per_s": Metric("tokens a second", "more", {"throughput": "throughput"}, **_SUMMARY),
    "step_s": Metric("seconds a step", "less", {"step": "whole step"}, **_SUMMARY),
    **{
        f"time_{phase}_s": Metric(f"seconds of {phase.replace('_', ', ')}", "less", always=phase != "eval")
        for phase in PHASES
    },
}


def require_known(keys: Iterable[str]) -> None:
    """Raises KeyError that names each metric without a row in METRICS."""
    if unknown := sorted(set(keys) - METRICS.keys()):
        raise KeyError(f"metrics must be rows of METRICS in observe/catalogue.py, got {', '.join(unknown)}.")


def keys_of(panel: str) -> dict[str, str]:
    """The keys of a panel's metrics, with their labels there."""
    return {key: metric.panels[panel] for key, metric in METRICS.items() if panel in metric.panels}
