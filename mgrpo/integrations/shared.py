"""Shared by the plug-ins: metrics that hosts log, and true answers from a host's columns."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mgrpo.algorithm.credit import Credit, needed_evidence
from mgrpo.config import Config
from mgrpo.distributed.sharding import fill, local, whole
from mgrpo.errors import InputError
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.label_text import Label, label_text
from mgrpo.grading.labels import make_label_reader
from mgrpo.models.momentum import Momentum
from mgrpo.observe.step import Outcome, mean, outcome_metrics
from mgrpo.types import Metrics


def credit_metrics(
    credit: Credit,
    *,
    lengths: torch.Tensor,
    truncated: torch.Tensor,
    entropy: torch.Tensor,
    true_answers: Sequence[Label | None],
    checker: AnswerChecker,
) -> Metrics:
    """The trainer's metrics of votes, lengths and the filter, and the policy's `accuracy` if answers are known.

    Args:
        credit: what `mgrpo.algorithm.credit.assign_credit` returned.
        lengths: [B, G] int64, response tokens.
        truncated: [B, G] bool, cut at the length limit.
        entropy: [B, G] fp32, mean token entropies in nats.
        true_answers: [B], None where there is none; for metrics only.
        checker: compares answers.
    """
    known = [(b, answer) for b, answer in enumerate(true_answers) if answer is not None]
    outcome = Outcome(
        **vars(credit),
        lengths=lengths,
        truncated=truncated,
        entropy=entropy,
        label_correct=[checker.is_correct(credit.labels[b], answer) for b, answer in known],
    )
    right = [
        checker.is_correct(given, answer) for b, answer in known for given in credit.answers[b][: credit.num_policy]
    ]
    return outcome_metrics(outcome) | {"accuracy": mean(right) if right else None}


def logged(metrics: Metrics) -> dict[str, float]:
    """The numbers among the metrics under the names by which a host logs them."""
    return {f"mgrpo/{k}": float(v) for k, v in metrics.items() if isinstance(v, int | float) and k != "step"}


def momentum_tensors(momentum: Momentum) -> dict[str, torch.Tensor]:
    """Averaged weights by name, and their Kahan terms as NAME/lost."""
    return momentum.weights | {f"{name}/lost": term for name, term in (momentum.compensation or {}).items()}


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file under a temporary name, then renames it; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    save_file(tensors, aside, metadata=metadata)
    os.replace(aside, path)


def load_tensors(
    targets: dict[str, torch.Tensor], path: Path, what: str = "tensors of this model and momentum_dtype"
) -> dict[str, str]:
    """Fills whole or sharded tensors from a file of whole ones and returns its metadata.

    Raises ValueError unless it holds exactly these tensors, which `what` describes.
    """
    with safe_open(path, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        wanted = {name: tuple(tensor.shape) for name, tensor in targets.items()}
        if found != wanted:
            different = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
            raise ValueError(
                f"mgrpo: {path} must hold the {len(wanted)} {what}, got {len(found)}, of which {different[0]} differs. "
                "Resume with the options of the run."
            )
        for name, target in targets.items():
            fill(target, file.get_tensor(name).to(local(target).device))
        return file.metadata() or {}


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded, on the host; every process must call it."""
    return whole(tensor.detach()).cpu().contiguous()


def missing_evidence(config: Config, *, host: str) -> list[str]:
    """A message for each vote rule or reward that needs evidence which `host` does not compute."""
    needed = needed_evidence(config.vote, config.objective)
    needed.pop("correct", None)
    return [f"{option} cannot be used: {host} does not compute {need}." for need, option in needed.items()]


logger = logging.getLogger(__name__)


@functools.lru_cache
def make_truth_reader(spec: str) -> Callable[[Any], Label | None]:
    """Returns a function from a value (text, number, list of those, or numpy's) to a label.

    A value without an answer gives None, as if there were no label, with a warning for the first: a run does not end
    because of a metric.

    Args:
        spec: `answer.label_extract`, as for `make_label_reader`.

    Raises:
        InputError: unknown spec, or an invalid pattern.
    """
    read = make_label_reader(spec)
    warned = False

    def read_value(value: Any) -> Label | None:
        nonlocal warned
        try:
            text = label_text(value, "label", "mgrpo")
            label = read(text)
            problem = f"mgrpo: no answer was found in the label {text!r:.200}" if text and not label else None
        except InputError as error:
            label, problem = None, str(error)
        if problem and not warned:
            warned = True
            logger.warning("%s; it counts as none. Set answer.label_extract (%s now), or plain.", problem, spec)
        return label

    return read_value
