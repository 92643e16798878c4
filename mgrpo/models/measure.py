"""Measures a model from its configuration alone: it is built and run on tensors without storage."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mgrpo.distributed.sharding import layers_of
from mgrpo.models.determinism import make_deterministic
from mgrpo.models.files import silence
from mgrpo.models.plain import head_and_embedding, plain_hidden
from mgrpo.models.size import cache_numbers, positive

# Prime, so that tensors whose size it divides are those that grow with the tokens.
_TRIAL_TOKENS = 61


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Numbers of parameters, and what a token adds; tied weights count once."""

    parameters: int
    matrices: tuple[tuple[str, int, int], ...]  # name, columns and rows of each linear layer except the head
    num_layers: int
    layer: int  # parameters of the largest decoder layer
    layers: int  # of all of them
    embedding: int  # of the input embedding
    head: int  # of the output embedding
    tied: bool  # whether the head is the input embedding
    vocabulary: int
    has_plain_head: bool  # whether the fused head can take the place of logits
    cache_numbers: int  # of the KV cache of a token, in all layers
    activations: Activations | None  # None for a model that cannot be run without storage


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What the forward pass of the decoder keeps for the backward pass, in bytes."""

    per_token: int
    per_token_pair: int  # of attention whose weights are kept: times the square of a sequence's length
    hidden: int  # of a token: the input of a layer
    largest: int  # of a token: its largest tensor


def measure_size(
    model_config: PretrainedConfig, *, attention: str, autocast: bool, half: bool, trust_remote_code: bool
) -> ModelSize | None:
    """Size of the model that a configuration describes; None if it cannot be built from that alone.

    Args:
        model_config: of the model.
        attention: implementation; a family that lacks it is measured with `eager`.
        autocast: whether forward passes cast fp32 weights to bf16.
        half: whether the weights themselves are in bf16 in forward passes.
        trust_remote_code: whether the model may run its own code.
    """
    dtype = torch.bfloat16 if half else torch.float32
    try:
        with silence(), FakeTensorMode(allow_non_fake_inputs=True):
            model = _build(model_config, attention, dtype, trust_remote_code)
            make_deterministic(model, gradient_checkpointing=False)
            size = _count(model)
            return replace(size, activations=_measure_activations(model, autocast=autocast))
    except Exception:  # loading the model reports any error
        return None


def _count(model: PreTrainedModel) -> ModelSize:
    """The size without activations."""
    head, embedding = head_and_embedding(model)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
    text = model.config.get_text_config()
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        matrices=tuple((name, m.in_features, m.out_features) for name, m in linear),
        num_layers=len(layers),
        layer=max(layers, default=0),
        layers=sum(layers),
        embedding=0 if embedding is None else embedding.numel(),
        head=0 if head is None else sum(p.numel() for p in head.parameters()),
        tied=head is None or getattr(head, "weight", None) is embedding,
        vocabulary=positive(text, "vocab_size") or 0,
        has_plain_head=isinstance(head, torch.nn.Linear) and not any(getattr(text, name, None) for name in _SCALES),
        cache_numbers=cache_numbers(text),
        activations=None,
    )


# Options of families whose logits are more than a product with the head; has_plain_head of forward.py tries it.
_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "mup_width_multiplier")


def _build(config: PretrainedConfig, attention: str, dtype: torch.dtype, trusted: bool) -> PreTrainedModel:
    """The model, on fake tensors."""
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trusted}
    try:
        # Of flash attention the tensors that are kept are those of sdpa.
        implementation = "eager" if attention == "eager" else "sdpa"
        return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, **options)
    except ValueError:
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", **options)


def _measure_activations(model: PreTrainedModel, *, autocast: bool) -> Activations | None:
    """What a pass of the decoder keeps; of equal layers one and two are run, and `model` has one in the end."""
    layers, kinds = layers_of(model), getattr(model.config.get_text_config(), "layer_types", None) or [None]
    num_more, sizes = len(layers) - 1, {sum(p.numel() for p in layer.parameters()) for layer in layers}
    try:
        if num_more < 1 or len(sizes) > 1 or any(kind != kinds[0] for kind in kinds):
            return _run(model, autocast=autocast)
        del layers[2:]
        two = _run(model, autocast=autocast)
        del layers[1:]
        one = _run(model, autocast=autocast)
    except Exception:  # of a model that reads values of tensors, or has no decoder
        return None
    return Activations(
        per_token=one.per_token + num_more * (two.per_token - one.per_token),
        per_token_pair=one.per_token_pair + num_more * (two.per_token_pair - one.per_token_pair),
        hidden=two.hidden,
        largest=two.largest,
    )


def _run(model: PreTrainedModel, *, autocast: bool) -> Activations:
    """Counts what autograd keeps of a pass of the decoder, weights and their casts left out."""
    tokens, kept = _TRIAL_TOKENS, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage, tensor.numel()  # holds the storage, or its address would be used again
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(),
    ):
        hidden = plain_hidden(model.get_decoder(), torch.zeros(1, tokens, dtype=torch.int64))
    pairs = [storage.nbytes() for storage, numel in kept.values() if numel % tokens**2 == 0]
    others = [storage.nbytes() for storage, numel in kept.values() if numel % tokens == 0 and numel % tokens**2]
    return Activations(
        per_token=sum(others) // tokens,
        per_token_pair=sum(pairs) // tokens**2,
        hidden=hidden.nbytes // tokens,
        largest=max(others, default=0) // tokens,
    )
