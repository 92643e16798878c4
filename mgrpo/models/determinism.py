"""Makes a forward pass depend on weights and tokens alone, also with gradient checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def make_deterministic(model: PreTrainedModel, *, gradient_checkpointing: bool) -> None:
    """Switches off everything that training mode adds: dropout, router noise, skipped layers, batch statistics.

    The modules that decide on checkpointing stay in training mode, because transformers requires it of them.

    Raises:
        ValueError: the model has no gradient checkpointing.
    """
    _disable_dropout(model)
    _disable_rescaling(model)
    model.eval()
    if not gradient_checkpointing:
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    deciding = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    layers = [module for module in deciding if isinstance(module, GradientCheckpointingLayer)]
    for module in [model, *(layers or deciding)]:
        module.training = True
    for layer in layers:
        layer.register_forward_pre_hook(_enter)
        layer.register_forward_hook(_leave, always_call=True)


def _enter(layer: torch.nn.Module, _: Any) -> None:
    """Puts a checkpointed layer, which has decided by then, into evaluation mode."""
    vars(layer)["decides_in_training"] = layer.training
    layer.training = False


def _leave(layer: torch.nn.Module, *_: Any) -> None:
    layer.training = vars(layer)["decides_in_training"]


def _disable_dropout(model: PreTrainedModel) -> None:
    """Switches every dropout off, also in checkpointed layers."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def _disable_rescaling(model: PreTrainedModel) -> None:
    """Keeps RWKV from dividing its weights in place in the first forward pass of evaluation mode.

    It does so against overflow in fp16. Here several models share the storage of the weights.
    """
    for module in model.modules():
        # The outermost configuration is saved and must not change.
        config = vars(module).get("config")
        if module is not model and config is not None and getattr(config, "rescale_every", 0):
            vars(module)["config"] = config = copy.copy(config)
            config.rescale_every = 0
