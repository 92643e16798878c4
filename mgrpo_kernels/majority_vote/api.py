"""Public function: majority vote over the answers of a group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels import ops  # noqa: F401  (defines torch.ops.mgrpo_kernels)
from mgrpo_kernels._common.checks import INTEGERS, check_tensor, checks_values, invalid
from mgrpo_kernels.backends import implementations, resolve
from mgrpo_kernels.majority_vote import reference
from mgrpo_kernels.results import MajorityVote


def _compiled(
    answer_ids: Tensor, *, keep: Tensor | None, weights: Tensor | None, tie_break: Tensor | None, backend: str
) -> tuple[MajorityVote, Tensor]:
    """Any compiled backend; also returns the least id and weight, which it reads anyway."""
    *vote, lowest = torch.ops.mgrpo_kernels.majority_vote(answer_ids, keep, weights, tie_break, backend)
    return MajorityVote(*vote), lowest


def _reference(**arguments: Any) -> tuple[MajorityVote, None]:
    """The reference, which does not return least values."""
    return reference.majority_vote(**arguments), None


_IMPLEMENTATIONS = implementations(_reference, _compiled)


def _least(values: Tensor | None) -> int:
    """The least value, 0 where there is none."""
    return 0 if values is None or values.numel() == 0 else int(values.min())


def majority_vote(
    answer_ids: Tensor,
    *,
    keep: Tensor | None = None,
    weights: Tensor | None = None,
    tie_break: Tensor | None = None,
    backend: str = "auto",
) -> MajorityVote:
    """The label is argmax_y sum_j w_j 1(y_j = y) over the kept rollouts of a prompt.

    Args:
        answer_ids: [B, G] int64, G >= 1: equal ids are equal answers, -1 is no answer. The order in G matters for ties.
        keep: [B, G] bool, the rollouts that vote. Default: all.
        weights: [B, G] int32 or int64 >= 0, votes of each rollout; a rollout of weight 0 does not vote. Default: 1.
        tie_break: [B, G] bool, the rollouts that decide a tie, by the sum of their weights. Default: none.
        backend: "auto" or a name from `backends()`.

    Returns:
        MajorityVote: label [B] int64 (-1 where nobody voted), share [B] = votes of the label / votes of all kept
        rollouts, answered or not, margin [B] = share minus the share of the second, tie [B] before the tie rule,
        class_share [B, G] = share of each rollout's own answer, for rollouts that do not vote too (0 for no answer). A
        tie goes to the answer with more tie_break votes, then to the one whose earliest voter has the lowest index.

    Raises:
        ValueError: a shape, dtype or device is wrong; on a CPU, or with MGRPO_CHECK=1, also an id below -1 or a
            negative weight. Elsewhere an id below -1 is no answer and a negative weight counts as 0.

    Numerics: votes are counted in integers; shares are one fp32 division.

    Cost: one read of the arguments; the reference compares every pair of a prompt.

    Source: Wang et al. 2022, arXiv 2203.11171; TTRL, arXiv 2504.16084.
    """
    where = "majority_vote"
    check_tensor(where, "answer_ids", answer_ids, "[B, G]", (None, None), (torch.int64,))
    shape, device = tuple(answer_ids.shape), answer_ids.device
    if shape[1] == 0:
        raise invalid(where, "answer_ids", "of shape [B, G] with G >= 1", list(shape), "Pass rollouts.")
    if keep is not None:
        check_tensor(where, "keep", keep, "[B, G]", shape, (torch.bool,), device)
    if weights is not None:
        check_tensor(where, "weights", weights, "[B, G]", shape, INTEGERS, device)
    if tie_break is not None:
        check_tensor(where, "tie_break", tie_break, "[B, G]", shape, (torch.bool,), device)
    implementation = _IMPLEMENTATIONS[resolve(where, device, backend, (), _IMPLEMENTATIONS)]
    vote, lowest = implementation(answer_ids=answer_ids, keep=keep, weights=weights, tie_break=tie_break)
    if checks_values(device):
        least_id, least_weight = (_least(answer_ids), _least(weights)) if lowest is None else lowest.tolist()
        if least_id < -1:
            raise invalid(where, "answer_ids", ">= -1", least_id, "Use -1 for no answer.")
        if least_weight < 0:
            raise invalid(where, "weights", ">= 0", least_weight, "Use 0 for no vote.")
    return vote
