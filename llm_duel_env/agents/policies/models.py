"""The models of a language-model policy: the one that trains, its reference, and the frozen one it started as."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llm_duel_env import ranks
from llm_duel_env.adapters import base_model, is_adapter
from llm_duel_env.agents.policies import checkpointing, lora
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.encoder import load_model
from llm_duel_env.agents.policies.learners.base import make_learner
from llm_duel_env.agents.policies.samplers.base import weights


class Models:
    """What a policy holds in memory, and where.

    With all weights training there are two models, and three once the reference has moved. With LoRA there is one: the
    frozen start is the policy with its adapter off. Where training starts from an adapter the start is a model of its
    own, and so is a reference that has moved.

    Args:
        start: a model folder or hub name, or a folder with a peft adapter.
        config: says whether LoRA, gradient checkpointing, offloading.
        device: where models run.
        seed: of a fresh adapter.
        bf16: whether matrix products run in bfloat16: the weights that LoRA keeps frozen are then held in it.

    Raises:
        ValueError: no such model; settings that it does not allow.
    """

    def __init__(self, start: str, config: PolicyConfig, *, device: torch.device, seed: int, bf16: bool) -> None:
        self.start, self.config, self.device = start, config, device
        self.lora = config.lora_rank > 0
        from_adapter = is_adapter(start)
        if from_adapter and config.sampler == "vllm":
            raise ValueError(f"policy.sampler: vllm loads model folders, got the adapter {start}; export it first")
        frozen: Any
        if self.lora:
            self.policy = load_model(base_model(start) if from_adapter else start, device)
            if from_adapter:
                lora.continue_adapter(self.policy, start, config)
            else:
                lora.add_adapter(self.policy, config, seed)
            self.policy.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way mypy cannot follow
            self.policy.eval()
            if bf16:
                for parameter in self.policy.parameters():
                    if not parameter.requires_grad:
                        parameter.data = parameter.data.to(torch.bfloat16)
            frozen = load_model(start, device) if from_adapter else lora.AdapterOff(self.policy)
        else:
            self.policy = load_model(start, device)
            # Its parameters keep requires_grad, or autocast would cast its weights anew at every token it samples.
            frozen = copy.deepcopy(self.policy)
        self.encoder = cast(PreTrainedModel, frozen)
        self.reference = self.encoder
        if config.gradient_checkpointing:
            checkpointing.enable(self.policy)
        self._first = {name: value.clone() for name, value in lora.state(self.policy).items()} if self.lora else None

    def start_learning(self) -> None:
        """Makes the learner, which may scatter the policy's weights over ranks; the frozen models go to rest."""
        self.learner = make_learner(self.policy, self.config)
        for model in {id(m): m for m in (self.encoder, self.reference)}.values():
            self._move(model, self._rest(model))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The start's tokenizer; its base's where an adapter's folder has none."""
        own = not is_adapter(self.start) or (Path(self.start) / "tokenizer_config.json").is_file()
        return AutoTokenizer.from_pretrained(self.start if own else base_model(self.start), trust_remote_code=False)

    def _rest(self, model: Any) -> torch.device:
        """Where a frozen model is while nobody uses it."""
        offloaded = self.config.offload_reference and not isinstance(model, lora.AdapterOff)
        return torch.device("cpu") if offloaded else self.device

    @staticmethod
    def _move(model: Any, device: torch.device) -> None:
        if not isinstance(model, lora.AdapterOff) and model.device.type != device.type:
            model.to(device)

    @contextmanager
    def using(self, *models: PreTrainedModel) -> Iterator[None]:
        """Within the block these models can be called, without gradient: weights are gathered or brought back."""
        frozen = [m for m in models if m is self.reference or m is self.encoder]
        moved = [m for m in frozen if self._rest(m).type != self.device.type and m.device.type != self.device.type]
        for model in moved:
            self._move(model, self.device)
        try:
            if any(m is self.policy or isinstance(m, lora.AdapterOff) for m in models):
                with self.learner.whole():
                    yield
            else:
                yield
        finally:
            for model in moved:
                self._move(model, self._rest(model))

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights by the names of an ordinary model, an adapter merged: what another process is sent."""
        if not self.lora:
            yield from weights(self.policy)
            return
        with self.learner.whole():
            yield from lora.merged_weights(self.policy)

    def move_reference(self) -> None:
        """Makes the present policy the reference, in a model of its own."""
        if self.reference is self.encoder:
            self.reference = load_model(self.start, self.device)
        with torch.no_grad(), self.using(self.policy, self.reference):
            own = dict(self.reference.named_parameters())
            for name, value in lora.merged_weights(self.policy) if self.lora else self.policy.named_parameters():
                own[name].copy_(value)
        self._move(self.reference, self._rest(self.reference))

    def reset(self) -> None:
        """Puts the policy's weights and its optimizer back to the start."""
        self.learner.set_weights(self._first or self.encoder.state_dict())
        self.learner.reset()

    def save(self, folder: Path, reference: bool) -> None:
        """Writes model/ (an adapter alone, with LoRA), optionally reference/, and the optimizer's state.

        On all ranks together: rank 0 writes what is whole.
        """
        tensors = self.learner.weights()
        if self.learner.rank == 0:
            self.policy.save_pretrained(folder / "model", state_dict=tensors)
            if reference:
                self.reference.save_pretrained(folder / "reference")
        self.learner.save(folder)

    def load(self, folder: Path, reference: bool) -> None:
        """Restores what `save` wrote."""
        if self.lora:
            self.learner.set_weights(lora.read_state(folder / "model"))
        else:
            self.learner.set_weights(load_model(str(folder / "model"), self.device).state_dict())
        self.learner.load(folder)
        self.reference = self.encoder
        if reference:
            self.reference = load_model(str(folder / "reference"), self.device)
            self._move(self.reference, self._rest(self.reference))

    def export(self, folder: Path) -> None:
        """Writes the policy as an ordinary model folder, an adapter merged. On all ranks together."""
        tensors = self.learner.weights()
        if self.learner.rank == 0:
            if self.lora:
                lora.export(self.policy, tensors, folder)
            else:
                self.policy.save_pretrained(folder, state_dict=tensors)
            self.tokenizer().save_pretrained(folder)
