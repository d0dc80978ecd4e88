"""Gradient checkpointing: layers forget what they computed and compute it again for the gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def enable(model: PreTrainedModel) -> None:
    """Lets the model's layers be checkpointed, within `checkpointing`.

    Raises:
        ValueError: the model has no layers that can be.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not model.supports_gradient_checkpointing or not layers:
        raise ValueError(f"policy.gradient_checkpointing: {type(model).__name__} has no layers to checkpoint")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Only the reentrant kind needs inputs with a gradient.
    model.disable_input_require_grads()


@contextmanager
def checkpointing(model: nn.Module, on: bool) -> Iterator[None]:
    """Within the block the model's layers are checkpointed, where `on`.

    Transformers does so in training mode; only the layers themselves are put into it and not what is in them, so that
    there is no dropout.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)] if on else []
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
