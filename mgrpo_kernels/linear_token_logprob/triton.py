"""torch.mm with the Triton kernels of token_logprob; there is no separate kernel."""

from __future__ import annotations

from functools import partial

from mgrpo_kernels.linear_token_logprob import products
from mgrpo_kernels.token_logprob.triton import row_gradient, row_sums

linear_token_logprob_fwd = partial(products.linear_token_logprob_fwd, row_sums=row_sums)
linear_token_logprob_bwd = partial(products.linear_token_logprob_bwd, backend="triton", bf16_gradient=row_gradient)
