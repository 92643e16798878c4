"""Makes a forward pass depend on weights and tokens alone, with gradient checkpointing too."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def make_deterministic(model: PreTrainedModel, *, gradient_checkpointing: bool) -> None:
    """Switches off all that training mode adds: dropout, noise of routers, skipped layers, batch statistics.

    The modules that decide on checkpointing stay in training mode, for that is what transformers asks them.

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
    """Once it has decided, a layer that is checkpointed computes in evaluation mode."""
    vars(layer)["decides_in_training"] = layer.training
    layer.training = False


def _leave(layer: torch.nn.Module, *_: Any) -> None:
    layer.training = vars(layer)["decides_in_training"]


def _disable_dropout(model: PreTrainedModel) -> None:
    """Switches every dropout off: the layers that are checkpointed may hold one of their own."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def _disable_rescaling(model: PreTrainedModel) -> None:
    """Keeps RWKV from dividing its weights in place in the first forward pass of evaluation mode.

    It does so against overflow in fp16, and makes up for it between the blocks. Here several models share one storage.
    """
    for module in model.modules():
        # The outermost configuration is the one that is saved.
        config = vars(module).get("config")
        if module is not model and config is not None and getattr(config, "rescale_every", 0):
            vars(module)["config"] = config = copy.copy(config)
            config.rescale_every = 0
