"""Schema, fake and dispatch of every compiled operation (torch.library), so that torch.compile sees one node for each.

The last argument of every operation names the backend. A module of that name in the operation's folder, or native.py
where both devices share it, holds a function of the operation's name. The reference backend is plain PyTorch and needs
none of this. Letters: see the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels._common.structs import LossInputs, LossOptions, RowBackward, RowInputs

_NAMESPACE = "mgrpo_kernels"
_LIBRARY = torch.library.Library(_NAMESPACE, "DEF")


@cache
def _launcher(folder: str, name: str, backend: str) -> Callable[..., Any]:
    """The function that runs an operation on a backend."""
    package = f"{_NAMESPACE}.{folder}"
    module = backend if find_spec(f"{package}.{backend}") else "native"
    return getattr(import_module(f"{package}.{module}"), name)


def _fields(struct: type[tuple[Any, ...]]) -> str:
    """The fields of a struct in a schema."""
    kinds = {name: kind.__forward_arg__.replace(" | None", "?") for name, kind in struct.__annotations__.items()}
    return ", ".join(f"{kind} {name}" for name, kind in kinds.items())


_STRUCTS = {_fields(struct): struct for struct in (RowInputs, RowBackward, LossInputs, LossOptions)}
_ROWS, _ROW_BACKWARD, _LOSS_INPUTS, _LOSS_OPTIONS = _STRUCTS


def _pack(args: Sequence[Any], structs: Sequence[tuple[int, type[tuple[Any, ...]]]]) -> list[Any]:
    """Arguments, with those of each struct from its index on replaced by the struct."""
    packed, end = [], 0
    for start, struct in structs:
        packed += args[end:start]
        end = start + len(struct.__annotations__)
        packed.append(struct(*args[start:end]))
    return [*packed, *args[end:]]


def _define(folder: str, schema: str, writes: str = "") -> Callable[[Callable[..., Any]], None]:
    """Decorator of an operation's fake, which returns results of the right shapes and dtypes without values.

    The launchers take the structs of a schema as one argument each. `writes` names a tensor that they overwrite.
    """
    name = schema.partition("(")[0]
    places = [
        (schema[: schema.index(fields)].count(","), struct) for fields, struct in _STRUCTS.items() if fields in schema
    ]

    def run(*args: Any) -> Any:
        *inputs, backend = args
        first = inputs[0] if isinstance(inputs[0], Tensor) else inputs[0][0]
        launch, inputs = _launcher(folder, name, backend), _pack(inputs, places)
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return launch(*inputs)
        with torch.cuda.device(first.device):
            return launch(*inputs)

    def register(fake: Callable[..., Any]) -> None:
        _LIBRARY.define(schema.replace(f"Tensor {writes}", f"Tensor(a!) {writes}") if writes else schema)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, run, key)
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)

    return register


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


@_define("token_logprob", f"token_logprob_bwd({_ROWS}, {_ROW_BACKWARD}, str backend) -> Tensor dlogits")
def _(logits: Tensor, *args: object) -> Tensor:
    return logits.new_empty(logits.shape)


@_define("token_logprob", f"token_logprob_bwd_({_ROWS}, {_ROW_BACKWARD}, str backend) -> ()", writes="logits")
def _(logits: Tensor, *args: object) -> None:
    return None


_SEQUENCES = "Tensor? cu_seqlens, Tensor? mask, bool mean"


def _num_sequences(cu_seqlens: Tensor | None, mask: Tensor | None) -> int:
    """N of packed or padded tokens."""
    if mask is not None:
        return mask.shape[0]
    assert cu_seqlens is not None
    return cu_seqlens.shape[0] - 1


@_define("trajectory_entropy", f"trajectory_entropy_fwd(Tensor tokens, {_SEQUENCES}, str backend) -> Tensor entropy")
def _(tokens: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, mean: bool, backend: str) -> Tensor:
    return tokens.new_empty(_num_sequences(cu_seqlens, mask), dtype=torch.float32)


@_define(
    "trajectory_entropy",
    f"trajectory_entropy_bwd(Tensor dentropy, {_SEQUENCES}, SymInt[] shape, ScalarType dtype, str backend) "
    "-> Tensor dtokens",
)
def _(dentropy: Tensor, *args: Any) -> Tensor:
    shape, dtype, _ = args[-3:]
    return dentropy.new_empty(shape, dtype=dtype)


@_define("group_advantage", "group_advantage(Tensor rewards, Tensor? keep, str mode, str backend) -> Tensor advantage")
def _(rewards: Tensor, keep: Tensor | None, mode: str, backend: str) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=torch.float32)


@_define(
    "majority_vote",
    "majority_vote(Tensor answer_ids, Tensor? keep, Tensor? weights, Tensor? tie_break, str backend) "
    "-> (Tensor label, Tensor share, Tensor margin, Tensor tie, Tensor class_share, Tensor lowest)",
)
def _(answer_ids: Tensor, *args: object) -> tuple[Tensor, ...]:
    prompts = answer_ids.shape[0]
    dtypes = (torch.int64, torch.float32, torch.float32, torch.bool)
    by_prompt = (answer_ids.new_empty(prompts, dtype=dtype) for dtype in dtypes)
    return *by_prompt, answer_ids.new_empty(answer_ids.shape, dtype=torch.float32), answer_ids.new_empty(2)


@_define(
    "iqr_filter",
    "iqr_filter(Tensor entropy, float k, str scope, Tensor? keep, bool two_sided, str backend) "
    "-> (Tensor keep, Tensor q1, Tensor q3)",
)
def _(entropy: Tensor, k: float, scope: str, *args: object) -> tuple[Tensor, ...]:
    quartiles = (entropy.new_empty(() if scope == "batch" else entropy.shape[0]) for _ in range(2))
    return entropy.new_empty(entropy.shape, dtype=torch.bool), *quartiles


_HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float temperature, Tensor? temperatures, "
    "float softcap, int? budget_bytes"
)


@_define(
    "linear_token_logprob",
    # Logits of the first tiles of the vocabulary are kept for the backward, each [T, kept_columns[i]]: fp32, or with
    # `halved` fp16 differences to anchors [T].
    f"linear_token_logprob_fwd({_HEAD}, bool self_certainty, SymInt[] kept_columns, bool halved, str backend) "
    "-> (Tensor top, Tensor exp, Tensor exp_x, Tensor finite_x, Tensor num_finite, Tensor z_target, Tensor[] kept, "
    "Tensor[] anchors)",
)
def _(hidden: Tensor, *args: Any) -> tuple[Tensor | list[Tensor], ...]:
    rows, (columns, halved, _) = hidden.shape[0], args[-3:]
    kept = [hidden.new_empty((rows, width), dtype=torch.float16 if halved else torch.float32) for width in columns]
    anchors = [hidden.new_empty(rows, dtype=torch.float32) for _ in columns] if halved else []
    return *(hidden.new_empty(rows, dtype=torch.float32) for _ in range(6)), kept, anchors


@_define(
    "linear_token_logprob",
    f"linear_token_logprob_bwd({_HEAD}, Tensor logprob, Tensor lse, Tensor constant, "
    "Tensor? onehot, Tensor? slope, Tensor? uniform, Tensor[] kept, Tensor[] anchors, bool fp32_dhidden, "
    "bool needs_hidden, bool needs_weight, bool needs_bias, str backend) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias)",
)
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    fp32_dhidden, needs_hidden, needs_weight, needs_bias, _ = args[-5:]
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0, 0), dtype=torch.float32 if fp32_dhidden else None),
        weight.new_empty(weight.shape if needs_weight else (0, 0)),
        hidden.new_empty(weight.shape[0] if needs_bias else 0, dtype=torch.float32),
    )


@_define(
    "ema_update",
    # Lists hold present tensors; compensated and published are the indices of their momentum. No offsets: all are 0.
    "ema_update_(Tensor(a!)[] momentum, Tensor[] policy, Tensor(b!)[] compensation, int[] compensated, "
    "Tensor(c!)[] publish, int[] published, float decay, Tensor? decay_tensor, bool stochastic, int seed, SymInt step, "
    "Tensor? step_tensor, SymInt[] offsets, str backend) -> ()",
)
def _(momentum: Sequence[Tensor], *args: object) -> None:
    return None


NUM_METRICS = 7


def _loss_outputs(like: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and metrics."""
    return like.new_empty((), dtype=torch.float32), like.new_empty(NUM_METRICS, dtype=torch.float32)


@_define(
    "grpo_loss",
    f"grpo_loss_fwd(Tensor logprob, Tensor? entropy, {_LOSS_INPUTS}, {_LOSS_OPTIONS}, bool needs_dlogprob, "
    "bool needs_dentropy, str backend) -> (Tensor loss, Tensor metrics, Tensor dlogprob, Tensor dentropy)",
)
def _(logprob: Tensor, entropy: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *_, needs_dlogprob, needs_dentropy, _backend = args
    gradients = (
        logprob.new_empty(logprob.shape if needed else (0,), dtype=torch.float32)
        for needed in (needs_dlogprob, needs_dentropy)
    )
    return *_loss_outputs(logprob), *gradients


@_define(
    "grpo_loss",
    f"logits_grpo_loss_fwd(Tensor logits, Tensor targets, float temperature, Tensor? temperatures, {_LOSS_INPUTS}, "
    f"{_LOSS_OPTIONS}, bool needs_row_grads, bool needs_dlogits, str backend) -> (Tensor loss, Tensor metrics, "
    "Tensor logprob, Tensor entropy, Tensor lse, Tensor dlogprob, Tensor dentropy, Tensor dlogits)",
)
def _(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *_, needs_row_grads, needs_dlogits, _backend = args
    sizes = (logits.shape[0],) * 3 + (logits.shape[0] if needs_row_grads else 0,) * 2
    rows = (logits.new_empty(size, dtype=torch.float32) for size in sizes)
    return *_loss_outputs(logits), *rows, logits.new_empty(logits.shape if needs_dlogits else (0, logits.shape[1]))
