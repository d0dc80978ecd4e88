"""How much memory a pass through a model would take, found without the memory: the policy's own code is run on torch's
fake tensors, which have shapes and no numbers, and what is alive at a time is added up.

A model of full width and few layers is run; what a layer adds is the same for each, and taken times the layers that are
left out.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig

from llm_duel_env.agents.policies import checkpointing, lora, packed_rows
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.shared_prefix import Prefix, PrefixRows, attending

FEW = 2
"""Layers that are run."""

Layout = Literal["packed", "shared", "copied"]
"""All responses of a prompt behind it in one row; attending to its one copy; each behind a copy of its own."""


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with other number of layers, at most as many as it has."""
    changed: Any = copy.deepcopy(config)
    if getattr(changed, "layer_types", None):
        changed.layer_types = changed.layer_types[:layers]
    changed.num_hidden_layers = layers
    return changed


class Alive(TorchDispatchMode):
    """Within the block, counts the bytes of tensors made and not let go. Copies of a model's weights in another type
    are left out: autocast makes one of each, however many rows there are."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        weights = [*model.parameters(), *model.buffers()]
        self._known = {weight.untyped_storage()._cdata for weight in weights}
        self._kept = weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        copied = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._known
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), copied)
        return made

    def _count(self, storage: Any, free: bool) -> None:
        number = storage._cdata
        if number in self._known:
            return
        self._known.add(number)
        size = 0 if free else storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, number, size)

    def _forget(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.now -= size


def on_meta(config: PretrainedConfig, policy: PolicyConfig | None = None) -> Any:
    """A causal language model without numbers, on torch's meta device; with the policy's adapter, where it has one."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if policy is not None and policy.lora_rank:
            lora.add_adapter(model, policy, 0)
            model.eval()
    return model


def _fake(config: PretrainedConfig, layers: int, policy: PolicyConfig | None, bf16: bool) -> Any:
    """A fake model of few layers on the CPU, as the policy that trains is: called within a fake mode."""
    model = on_meta(with_layers(config, layers), policy)
    frozen = torch.bfloat16 if policy is not None and policy.lora_rank and bf16 else torch.float32
    made: dict[int, torch.nn.Parameter] = {}  # weights that are tied stay so
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) not in made:
                dtype = torch.float32 if weight.requires_grad else frozen
                made[id(weight)] = torch.nn.Parameter(torch.empty(weight.shape, dtype=dtype), weight.requires_grad)
            module._parameters[name] = None if weight is None else made[id(weight)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
    if policy is not None and policy.gradient_checkpointing:
        checkpointing.enable(model)
    return model


def prefill(config: PretrainedConfig, prompts: int, length: int, *, bf16: bool) -> int:
    """Bytes of work while prompts run without gradient, on top of their keys and values."""
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model = _fake(config, FEW, None, bf16)
        with Alive(model) as alive:
            cache = DynamicCache()
            ids = torch.zeros(prompts, length, dtype=torch.int64)
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            layers: list[Any] = cache.layers
            kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return max(alive.peak - kept, 0)


def learning(
    config: PretrainedConfig,
    policy: PolicyConfig,
    *,
    rows: int,
    responses: int,
    prompt_tokens: int,
    new_tokens: int,
    one_call: bool,
    bf16: bool,
) -> int:
    """Bytes alive at the end of a microbatch's forward pass, logits left out: what the backward pass needs.

    Args:
        config: of the model, at full size.
        policy: adapter and checkpointing.
        rows: prompts of the microbatch.
        responses: to each prompt.
        prompt_tokens: of each prompt.
        new_tokens: of each response.
        one_call: whether all runs in one call of the model (`scoring.log_probs`); with checkpointing it does.
        bf16: whether matrix products run in bfloat16.
    """

    sizes = (rows, responses, prompt_tokens, new_tokens)
    layout = layout_of(config, responses, prompt_tokens, new_tokens, one_call or policy.gradient_checkpointing)

    def measure(layers: int) -> int:
        return _forward(config, policy, layers, sizes, layout, bf16)

    total = extrapolated(measure, int(config.get_text_config().num_hidden_layers))
    if policy.gradient_checkpointing:  # one layer at a time computes again, and keeps all of its own
        whole = replace(policy, gradient_checkpointing=False)
        two, three = (_forward(config, whole, layers, sizes, layout, bf16) for layers in (FEW, FEW + 1))
        total += three - two
    return total


def layout_of(config: PretrainedConfig, responses: int, prompt_tokens: int, new_tokens: int, one_call: bool) -> Layout:
    """How responses of the greatest length stand when a policy learns from them, as `scoring.log_probs` has it."""
    width, alone = prompt_tokens + responses * new_tokens, prompt_tokens + new_tokens
    if packed_rows.pays(width, alone, int(config.get_text_config().hidden_size)):
        return "packed"
    return "copied" if one_call else "shared"


def extrapolated(measure: Callable[[int], int], layers: int) -> int:
    """What `measure` would say of many layers, from what it says of few."""
    if layers <= FEW + 1:
        return measure(layers)
    few = measure(FEW)
    return few + (layers - FEW) * (measure(FEW + 1) - few)


def _forward(
    config: PretrainedConfig,
    policy: PolicyConfig,
    layers: int,
    sizes: tuple[int, int, int, int],
    layout: Layout,
    bf16: bool,
) -> int:
    rows, responses, prompt_tokens, new_tokens = sizes
    mask = torch.ones(rows, prompt_tokens, dtype=torch.bool)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model = _fake(config, layers, policy, bf16)
    head = model.get_output_embeddings()
    head.forward = lambda hidden: hidden[..., :1]  # logits are counted elsewhere: see `output_layer`
    checkpointed = checkpointing.checkpointing(model, policy.gradient_checkpointing)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), checkpointed:
        if layout == "packed":
            width = prompt_tokens + responses * new_tokens
            with fake, Alive(model) as alive:
                ids = torch.zeros(rows, width, dtype=torch.int64)
                seen = torch.ones(rows, 1, width, width, dtype=torch.bool)
                kept = [model(input_ids=ids, attention_mask=seen, position_ids=ids, use_cache=False).logits]
            return alive.peak + 0 * len(kept)
        if layout == "copied":
            with fake, Alive(model) as alive:
                ids = torch.zeros(rows * responses, prompt_tokens + new_tokens, dtype=torch.int64)
                kept = [model(input_ids=ids, use_cache=False).logits]
            return alive.peak + 0 * len(kept)
        alive = Alive(model)
        with fake, alive:
            cache = DynamicCache()
            ids = torch.zeros(rows, prompt_tokens, dtype=torch.int64)
            first = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            held: list[Any] = cache.layers
        prefix = Prefix([layer.keys for layer in held], [layer.values for layer in held], mask, first)
        which = PrefixRows(prefix, torch.arange(rows).repeat_interleave(responses))  # of real numbers
        with fake, alive, attending(model):
            ids = torch.zeros(rows * responses, new_tokens, dtype=torch.int64)
            positions = which.positions(0, new_tokens)
            kept = [model(input_ids=ids, position_ids=positions, use_cache=False, prefix_rows=which).logits]
    return alive.peak + 0 * len(kept)
