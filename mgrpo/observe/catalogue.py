"""Every metric of a step: its name for people, whether more of it is better, and where it is drawn.

A metric is added by a row of METRICS; a key that is in no row fails where it is logged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """One metric."""

    label: str  # with its unit
    better: Literal["more", "less"] | None = None
    panels: Mapping[str, str] = MappingProxyType({})  # keys of PANELS where it is drawn, each with its label there
    always: bool = False  # in every row, null where it does not apply
    summary: bool = False  # in the report's table


class Panel(NamedTuple):
    """One pair of axes, which metrics share."""

    figure: str
    title: str
    share: bool = False  # values in [0, 1]
    log: bool = False


FIGURES = {
    "reward": "Reward against accuracy: a reward that rises while accuracy falls is collapse",
    "entropy": "Entropy",
    "answers": "Concentration of answers",
    "lengths": "Lengths of responses",
    "signal": "What gives no signal",
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
    "top_answers": Panel("momentum", "share of the commonest answer", share=True),
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
_SUMMARY = {"always": True, "summary": True}


def _pair(key: str, label: str, panel: str) -> dict[str, Metric]:
    """The same metric of the policy's and of the momentum model's rollouts."""
    return {f"{key}_{source}": Metric(f"{label}, {source}", None, {panel: source}) for source in SOURCES}


def _probe(source: str) -> dict[str, Metric]:
    """Metrics of one model on the probe."""
    name = f"probe accuracy, {source}"
    return {
        f"probe_accuracy_{source}": Metric(
            name, "more", {"reward": name, "agreement": name}, always=True, summary=True
        ),
        f"probe_greedy_{source}": Metric(f"{name}, greedy", "more", summary=True),
        f"probe_majority_{source}": Metric(f"{name}, of the majority", "more"),
        f"probe_pass_{source}": Metric(f"{name}, of any sample", "more"),
    }


def _phase(phase: str, *, always: bool = True) -> dict[str, Metric]:
    """Seconds of a part of a step."""
    return {f"time_{phase}_s": Metric(f"seconds of {phase.replace('_', ', ')}", "less", always=always)}


METRICS: dict[str, Metric] = {
    "step": Metric("step", always=True),
    "reward_mean": Metric("reward", "more", {"reward": "reward"}, **_SUMMARY),
    "reward_mean_momentum": Metric("reward, momentum", "more"),
    "majority_share": Metric("vote share of the pseudo-label", None, {"reward": "vote share of the label"}, **_SUMMARY),
    "vote_accuracy": Metric("vote accuracy", "more", {"reward": "vote accuracy"}, **_SUMMARY),
    "vote_agreement": Metric("policy-momentum vote agreement", "more", {"agreement": "votes agree"}, **_SUMMARY),
    **_probe("policy"),
    **_probe("momentum"),
    "retention": Metric("share of the answers of the start that are left", "more", always=True),
    "top_answer": Metric("commonest answer"),
    "top_answer_share": Metric(
        "commonest answer, share of rollouts", "less", {"answers": "commonest answer of all prompts"}, **_SUMMARY
    ),
    **_pair("top_answer_share", "commonest answer, share of rollouts", "top_answers"),
    "distinct_answers": Metric("distinct answers a prompt", None, {"distinct": "distinct answers"}, **_SUMMARY),
    "token_entropy": Metric("token entropy, nats", None, {"entropy": "token entropy"}, **_SUMMARY),
    **_pair("token_entropy", "token entropy, nats", "entropies"),
    "response_length": Metric("response length, tokens", None, {"lengths": "all"}, **_SUMMARY),
    **_pair("response_length", "response length, tokens", "both_lengths"),
    "kept_length": Metric("length of the rollouts that were kept, tokens", None, {"lengths": "kept"}, always=True),
    "pruned_length": Metric(
        "length of the rollouts that were pruned, tokens", None, {"lengths": "pruned by the filter"}, always=True
    ),
    "pruned_share": Metric("pruned by the filter", None, {"signal": "rollouts pruned by the filter"}, **_SUMMARY),
    "zero_signal_share": Metric("prompts without signal", "less", {"signal": "prompts without signal"}, **_SUMMARY),
    "no_signal_share": Metric("prompts whose vote gives no signal", "less"),
    "tie_share": Metric("prompts with a tie", "less", {"signal": "prompts with a tie"}, always=True),
    "unparseable_share": Metric("without answer", "less", {"signal": "rollouts without answer"}, **_SUMMARY),
    **_pair("unparseable_share", "without answer", "unparseable"),
    "truncated_share": Metric("truncated", "less", {"truncated": "cut at the length limit"}, **_SUMMARY),
    "kl": Metric("KL to the reference", None, {"kl": "to the reference"}, **_SUMMARY),
    "kl_initial": Metric("KL to the initial model", None, {"kl": "to the initial model"}, always=True),
    "loss": Metric("loss", None, {"loss": "loss"}, **_SUMMARY),
    "grad_norm": Metric("gradient norm", None, {"grad_norm": "before clipping"}, **_SUMMARY),
    "lr": Metric("learning rate", None, {"lr": "learning rate"}, always=True),
    "ratio_mean": Metric("mean importance ratio"),
    "clip_low_share": Metric("share of tokens at the lower clip"),
    "clip_high_share": Metric("share of tokens at the upper clip"),
    "tis_mean": Metric("mean truncated importance weight", always=True),
    "tis_clipped_share": Metric("share of tokens at the cap of that weight", "less", always=True),
    "logprob_gap": Metric("log-probs of engine and trainer, mean difference, nats", "less", always=True),
    "parity_policy": Metric("log-probs of the engine, policy, mean difference, nats", "less"),
    "parity_momentum": Metric("log-probs of the engine, momentum, mean difference, nats", "less"),
    "nonfinite_steps": Metric("optimiser steps that were not finite", "less", always=True),
    "rollbacks": Metric("rollbacks", "less", always=True),
    "alarm": Metric("alarms of the collapse monitor", always=True),
    "kv_cache_usage": Metric("most of the KV cache in use, share"),
    "redrawn": Metric("rollouts that vLLM drew again", "less"),
    "tokens_per_s": Metric("tokens a second", "more", {"throughput": "throughput"}, **_SUMMARY),
    "step_s": Metric("seconds a step", "less", {"step": "whole step"}, **_SUMMARY),
    **_phase("rollout"),
    **_phase("rollout_policy"),
    **_phase("rollout_momentum"),
    **_phase("publish"),
    **_phase("score"),
    **_phase("vote"),
    **_phase("update"),
    **_phase("ema"),
    **_phase("monitor"),
    **_phase("checkpoint"),
    **_phase("eval", always=False),
}


def require_known(keys: Iterable[str]) -> None:
    """Raises KeyError naming each metric that is in no row of METRICS."""
    if unknown := sorted(set(keys) - METRICS.keys()):
        raise KeyError(f"metrics must be rows of METRICS in observe/catalogue.py, got {', '.join(unknown)}.")


def keys_of(panel: str) -> dict[str, str]:
    """Keys of the metrics of a panel, and their labels there."""
    return {key: metric.panels[panel] for key, metric in METRICS.items() if panel in metric.panels}
