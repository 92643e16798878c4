"""torch.mm with the CUDA kernels of token_logprob; there is no separate kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels.linear_token_logprob import products


def linear_token_logprob_fwd(*args: Any) -> tuple[Tensor | list[Tensor], ...]:
    """See ops.py."""
    row_sums = partial(products.cuda_row_sums, is_exact=args[0].dtype != torch.bfloat16)
    return products.linear_token_logprob_fwd(*args, row_sums=row_sums)


linear_token_logprob_bwd = partial(products.linear_token_logprob_bwd, backend="cuda")
