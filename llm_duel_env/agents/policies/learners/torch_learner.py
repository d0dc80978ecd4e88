"""Takes optimizer steps with torch's AdamW, in one process, or on ranks that each hold the whole model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm_duel_env import ranks
from llm_duel_env.agents.policies.base import PolicyConfig

CHECK_EVERY = 50
"""Steps after which ranks compare their weights."""


def check_weights(steps: int, parameters: Mapping[str, Tensor]) -> None:
    """After every `CHECK_EVERY` steps compares the ranks' weights, by one sum for each tensor. RanksDiffer where they
    have drifted apart."""
    if steps % CHECK_EVERY == 0:
        ranks.check_alike("the policy's weights", (p.detach().double().sum() for p in parameters.values()))


class TorchLearner:
    """AdamW over a model's parameters, with its moments: the `Engine` of `loop.train`.

    Args:
        model: what is trained.
        config: the optimizer's constants.
        fused: whether AdamW runs as one kernel (small models gain).
    """

    uniform = False

    def __init__(self, model: nn.Module, config: PolicyConfig, *, fused: bool = False) -> None:
        self.model, self.config, self.fused = model, config, fused
        self.rank, self.world = ranks.rank(), ranks.world()
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=fused or None,
        )
        self.gradient_steps = 0
        """Steps taken, those before a `reset` included."""

    def add(self, name: str, module: nn.Module) -> None:
        """Trains a module beside the model, with its optimizer and clipping; its weights are its owner's to save."""
        added = {f"{name}.{key}": p for key, p in module.named_parameters()}
        self.parameters |= added
        self.optimizer.add_param_group({"params": list(added.values())})

    def begin(self, learning_rate: float) -> None:
        """See `Engine.begin`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, value: Tensor, last: bool) -> None:
        """See `Engine.backward`."""
        value.backward()

    def step(self) -> float:
        """See `Engine.step`.

        Raises:
            RanksDiffer: the ranks' weights have drifted apart.
        """
        ranks.add_up(p.grad for p in self.parameters.values() if p.grad is not None)
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.config.grad_clip))
        if not np.isfinite(norm):
            raise FloatingPointError(
                f"the policy's gradient norm is {norm} at step {self.gradient_steps}: training diverged; "
                "its weights were left as they were"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.gradient_steps += 1
        check_weights(self.gradient_steps, self.parameters)
        return norm

    def total(self, values: list[float]) -> list[float]:
        """See `Engine.total`."""
        sums = torch.tensor(values, dtype=torch.float64)
        ranks.add_up([sums])
        return sums.tolist()

    def whole(self) -> AbstractContextManager[None]:
        """See `Learner.whole`."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """See `Learner.weights`."""
        return {name: value.detach() for name, value in self.model.state_dict().items()}

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """See `Learner.set_weights`."""
        unknown = self.model.load_state_dict(weights, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"the weights {unknown[:4]} do not fit this model")

    def reset(self) -> None:
        """Forgets the moments; the count of steps goes on."""
        self.optimizer.state.clear()

    def save(self, folder: Path) -> None:
        """Writes optimizer.safetensors (moments and step of every parameter) and optimizer.json.

        Rank 0 alone does: the others hold the same, and every rank loads what rank 0 wrote.
        """
        if self.rank > 0:
            return
        tensors = {
            f"{name}/{kind}": value.detach().cpu().contiguous()
            for name, parameter in self.parameters.items()
            for kind, value in self.optimizer.state.get(parameter, {}).items()
        }
        save_file(tensors, folder / "optimizer.safetensors")
        (folder / "optimizer.json").write_text(json.dumps({"gradient_steps": self.gradient_steps}))

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote. ValueError where it belongs to other parameters."""
        tensors = load_file(folder / "optimizer.safetensors")
        self.optimizer.state.clear()
        for key, value in tensors.items():
            name, _, kind = key.rpartition("/")
            if name not in self.parameters or (value.ndim and value.shape != self.parameters[name].shape):
                raise ValueError(f"{folder}: the optimizer state of {name!r} does not fit this model")
            # AdamW keeps its step count on the CPU, whatever the device of the parameter, unless it is fused.
            device = "cpu" if kind == "step" and not self.fused else self.parameters[name].device
            self.optimizer.state[self.parameters[name]][kind] = value.to(device)
        self.gradient_steps = json.loads((folder / "optimizer.json").read_text())["gradient_steps"]
