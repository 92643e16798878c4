"""Schema, fake and dispatch of every compiled operation (torch.library), so that torch.compile sees one node for each.

The last argument of every operation names the backend, whose module in the operation's folder holds a function of the
operation's name. The reference backend is plain PyTorch and needs none of this. Letters: see the package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_NAMESPACE = "mgrpo_kernels"
_LIBRARY = torch.library.Library(_NAMESPACE, "DEF")
_MODULES = {"cpu": "native"}


@cache
def _launcher(folder: str, name: str, backend: str) -> Callable[..., Any]:
    """The function that runs an operation on a backend; it takes the schema's arguments but for the backend."""
    return getattr(import_module(f"{_NAMESPACE}.{folder}.{_MODULES[backend]}"), name)


def _define(folder: str, schema: str) -> Callable[[Callable[..., Any]], None]:
    """Decorator of an operation's fake: shapes and dtypes of the results without their values."""
    name = schema.partition("(")[0]

    def run(*args: Any) -> Any:
        *inputs, backend = args
        return _launcher(folder, name, backend)(*inputs)

    def register(fake: Callable[..., Any]) -> None:
        _LIBRARY.define(schema)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, run, key)
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)

    return register


_ROWS = "Tensor logits, Tensor targets, Tensor? mask, float temperature, Tensor? temperatures, float softcap"


@_define(
    "token_logprob",
    f"token_logprob_fwd({_ROWS}, bool self_certainty, str backend) "
    "-> (Tensor logprob, Tensor entropy, Tensor lse, Tensor self_certainty, Tensor num_finite)",
)
def _(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    self_certainty: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    extra = logits.shape[0] if self_certainty else 0
    sizes = (logits.shape[0],) * 3 + (extra,) * 2
    return tuple(logits.new_empty(size, dtype=torch.float32) for size in sizes)


_ROW_GRADS = (
    "Tensor logprob, Tensor entropy, Tensor lse, Tensor? num_finite, Tensor? dlogprob, Tensor? dentropy, Tensor? dlse, "
    "Tensor? dself_certainty"
)


@_define("token_logprob", f"token_logprob_bwd({_ROWS}, {_ROW_GRADS}, str backend) -> Tensor dlogits")
def _(logits: Tensor, *args: object) -> Tensor:
    return logits.new_empty(logits.shape)


@_define(
    "token_logprob",
    f"token_logprob_bwd_({_ROWS.replace('Tensor logits', 'Tensor(a!) logits')}, {_ROW_GRADS}, str backend) -> ()",
)
def _(logits: Tensor, *args: object) -> None:
    return None
