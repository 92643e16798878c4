"""Argument structs of the operations; ops.py builds schemas from the fields in their order."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mgrpo_kernels._common.checks import IGNORED_TARGET


class RowInputs(NamedTuple):
    """Rows of logits with targets, mask and scale."""

    logits: Tensor  # [T, V]
    targets: Tensor  # [T]
    mask: Tensor | None  # [T]
    temperature: float  # used if temperatures is None
    temperatures: Tensor | None  # [T]
    softcap: float  # 0 for none


class RowBackward(NamedTuple):
    """Saved results of a forward on rows, and upstream gradients, each [T]."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    num_finite: Tensor | None
    dlogprob: Tensor | None
    dentropy: Tensor | None
    dlse: Tensor | None
    dself_certainty: Tensor | None


class LossInputs(NamedTuple):
    """Tensors of a loss without gradients; log-probs have the shape of the mask, [T] or [N, L]."""

    advantage: Tensor  # shaped as the mask, or [N]
    mask: Tensor
    old_logprob: Tensor | None
    ref_logprob: Tensor | None
    rollout_logprob: Tensor | None
    cu_seqlens: Tensor | None  # [N+1]
    normalizer: Tensor | None  # 0-d

    @property
    def num_sequences(self) -> int:
        """N."""
        return self.mask.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def by_sequence(self) -> bool:
        """Whether there is one advantage a sequence, also if there are as many tokens."""
        packed = self.cu_seqlens is not None
        return self.advantage.dim() != self.mask.dim() or (packed and self.advantage.shape[0] == self.num_sequences)

    def with_targets(self, targets: Tensor) -> LossInputs:
        """The inputs with packed tokens without a target masked."""
        return self._replace(mask=self.mask & (targets != IGNORED_TARGET))


class LossOptions(NamedTuple):
    """Options of a loss that are not tensors."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_coef: float
    kl: str
    entropy_coef: float
    tis_cap: float
    ratio: str
    reduce: str
    max_length: float | None
    denominator: float | None  # replaces that of `reduce`; LossInputs.normalizer replaces both
