"""LoRA adapters (peft): a policy that trains few weights, and whose reference is itself with the adapter off."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_duel_env.adapters import WEIGHTS, load_merged
from llm_duel_env.extras import require
from llm_duel_env.randomness import torch_generator

if TYPE_CHECKING:
    from llm_duel_env.agents.policies.base import PolicyConfig

PREFIX = "base_model.model."
"""What peft puts before a weight's name in a file."""


def add_adapter(model: PreTrainedModel, config: PolicyConfig, seed: int) -> None:
    """Puts a fresh adapter on a model, in place: only the adapter's weights train, and at first it changes nothing.

    Args:
        model: a causal language model.
        config: rank, alpha and the modules that are adapted.
        seed: of the adapter's first weights.

    Raises:
        ValueError: the model has no such modules.
        MissingExtraError: peft is not installed.
    """
    peft: Any = require("peft", "policy.lora_rank")
    targets = config.lora_targets
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():  # its own draws are replaced below
        model.add_adapter(settings)
    draw = torch_generator(seed, "lora")
    for name, parameter in model.named_parameters():
        if "lora_A." in name:
            first = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=draw)
            with torch.no_grad():
                parameter.copy_(first)


def continue_adapter(model: PreTrainedModel, folder: str, config: PolicyConfig) -> None:
    """Puts the adapter of a folder on its base model, in place, to be trained further.

    Raises:
        ValueError: the folder's adapter has another rank than the configuration.
    """
    peft: Any = require("peft", "policy.lora_rank")
    settings = peft.PeftConfig.from_pretrained(folder)
    if getattr(settings, "r", None) != config.lora_rank:
        got = f"{type(settings).__name__} of rank {getattr(settings, 'r', None)} in {folder}"
        raise ValueError(f"policy.lora_rank: expected that of the adapter that training starts from, got {got}")
    settings.lora_dropout, settings.inference_mode = 0.0, False
    with torch.random.fork_rng():
        model.add_adapter(settings)
    put_state(model, folder)


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's weights by their names in the model."""
    return {name: value for name, value in model.state_dict().items() if ".lora_" in name}


def put_state(model: PreTrainedModel, folder: str | Path) -> None:
    """Restores the adapter's weights from a peft folder; see `read_state`."""
    result = model.load_state_dict(read_state(folder), strict=False)
    missing = [name for name in result.missing_keys if ".lora_" in name]
    if missing or result.unexpected_keys:
        wrong = sorted({*missing, *result.unexpected_keys})[:4]
        raise ValueError(f"{folder}: the adapter does not fit this model at {wrong}")


def read_state(folder: str | Path) -> dict[str, Tensor]:
    """The weights in a peft folder by their names in the model."""
    tensors = load_file(Path(folder) / WEIGHTS)
    names = {name: name.removeprefix(PREFIX) for name in tensors}
    for kind in ("lora_A.", "lora_B."):
        names = {name: new.replace(f".{kind}weight", f".{kind}default.weight") for name, new in names.items()}
    return {names[name]: value for name, value in tensors.items()}


def export(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Writes base and adapter as one ordinary model folder, merged in float32 (peft's `merge_and_unload`).

    Args:
        model: with an adapter.
        weights: its weights by name; at least the adapter's.
        folder: to write.
    """
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as adapter:
        model.save_pretrained(adapter, state_dict=weights)
        load_merged(adapter, AutoModelForCausalLM).save_pretrained(folder)


def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Weights by name as of a model without an adapter, base and adapter added up one layer at a time: what a sampler
    that holds the policy in another process is sent."""
    layers = dict(_layers(model))
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if owner not in layers:
            yield name, parameter.detach()
        elif kind == "weight":
            yield f"{owner}.weight", parameter.detach() + layers[owner].get_delta_weight("default").to(parameter.dtype)
        else:
            yield f"{owner}.{kind}", parameter.detach()


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


class AdapterOff:
    """A model seen with its adapter off: the base model, without a copy of it.

    Stands where a model is called: all else is the model's own. Not for training.
    """

    def __init__(self, model: PreTrainedModel, part: nn.Module | None = None) -> None:
        self._model = model
        self._part: Any = model if part is None else part
        self._layers = [layer for _, layer in _layers(model)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call, with the adapter off."""
        with self.off():
            return self._part(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        return AdapterOff(self._model, value) if name == "base_model" else value

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the adapter is off. The flag alone is set: peft's own switch would also change which
        weights train."""
        before = [layer._disable_adapters for layer in self._layers]
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, was in zip(self._layers, before):
                layer._disable_adapters = was
