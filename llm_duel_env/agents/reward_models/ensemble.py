"""The epistemic reward model: an ensemble of small networks on frozen features (SEA, arXiv 2411.01493, Sec. 4.2.1).

Each member is anchored to its own random start, so that members agree where there is data and disagree elsewhere: a
member drawn at random is, approximately, a draw from the posterior over rewards.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_duel_env import ranks
from llm_duel_env.agents.reward_models.replay import PairBuffer
from llm_duel_env.randomness import generator, torch_generator
from llm_duel_env.types import Metrics

CHECK_EVERY = 50
"""Rounds after which ranks compare what they hold."""
MOMENTS = ("exp_avg", "exp_avg_sq")
ADAM = ("step", *MOMENTS)


@dataclass(frozen=True)
class EnsembleConfig:
    """Defaults are SEA's (arXiv 2411.01493, App. D, and the released code)."""

    members: int = 20
    """E (paper: 20)."""
    hidden: int = 128
    """Units in each of the two hidden layers (paper: 128)."""
    anchor: float = 0.5
    """Strength lambda of the pull of each member to its own start (paper: 0.5)."""
    learning_rate: float = 1e-3
    """Of Adam (released code: 1e-3)."""
    steps: int = 5
    """Gradient steps per round (paper: 5)."""
    batch: int = 128
    """Duels per step, drawn uniformly from the buffer (released code: 128)."""
    start: int = 128
    """Duels that must be stored before the first step (released code: 128)."""
    capacity: int = 50_000
    """Duels kept (released code: 50,000)."""


class EnsembleRewardModel:
    """E reward networks with two hidden layers, computed together; features are never copied per member."""

    def __init__(
        self, feature_size: int, config: EnsembleConfig, *, seed: int, device: str | torch.device = "cpu"
    ) -> None:
        if min(config.members, config.hidden, config.batch, config.start, config.capacity) < 1 or config.steps < 0:
            raise ValueError(f"expected positive sizes and steps >= 0, got {config}")
        if not 0 <= config.anchor < float("inf"):
            raise ValueError(f"anchor: expected a finite number >= 0, got {config.anchor}")
        self.config, self.seed, self.device = config, seed, torch.device(device)
        e, h = config.members, config.hidden
        draw = torch_generator(seed, "ensemble")
        side_by_side = _truncated_normal((feature_size, e * h), feature_size, draw)  # (D, E * H)
        weights = {
            "w1": side_by_side.view(-1, e, h).transpose(0, 1).contiguous(),  # (E, D, H)
            "b1": torch.zeros(e, 1, h),
            "w2": _truncated_normal((e, h, h), h, draw),
            "b2": torch.zeros(e, 1, h),
            "w3": _truncated_normal((e, h, 1), h, draw),
            "b3": torch.zeros(e, 1, 1),
        }
        self.weights = {name: value.to(self.device).requires_grad_() for name, value in weights.items()}
        self.anchors = {name: value.detach().clone() for name, value in self.weights.items()}
        self.optimizer = torch.optim.Adam(list(self.weights.values()), lr=config.learning_rate, fused=True)
        self.buffer = PairBuffer(config.capacity, feature_size)
        self.steps = 0

    @property
    def trained(self) -> bool:
        """Whether any member has learnt anything yet."""
        return self.steps > 0

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """Rewards of all members, without gradient: (..., D) -> (E, ...)."""
        return self.forward(features.to(self.device))

    def forward(self, features: Tensor) -> Tensor:
        """Rewards of all members, with gradient: (..., D) -> (E, ...)."""
        w, shape = self.weights, features.shape
        if shape[-1] != w["w1"].shape[1]:
            raise ValueError(f"features: expected (..., {w['w1'].shape[1]}), got {tuple(shape)}")
        inputs = features.reshape(-1, shape[-1]).expand(self.config.members, -1, -1)  # (E, B, D), a view
        first = torch.baddbmm(w["b1"], inputs, w["w1"]).relu_()
        second = torch.baddbmm(w["b2"], first, w["w2"]).relu_()
        return torch.baddbmm(w["b3"], second, w["w3"]).view(self.config.members, *shape[:-1])

    def objective(self, pairs: Tensor, labelled: int) -> Tensor:
        """Per member: mean NLL of the duels + pull * squared distance from the member's start: (E,).

        Args:
            pairs: (B, 2, D) features, winner first.
            labelled: n, the number of labelled duels there are in all.
        """
        return self.nll(pairs) + self.pull(labelled) * self.squared_distance()

    def nll(self, pairs: Tensor) -> Tensor:
        """Mean -log sigmoid(r(winner) - r(loser)) of each member on duels (B, 2, D), winner first: (E,)."""
        rewards = self.forward(pairs)
        return F.softplus(rewards[:, :, 1] - rewards[:, :, 0]).mean(dim=1)

    def pull(self, labelled: int) -> float:
        """Strength of the pull to the start where there are `labelled` duels: anchor / n."""
        return self.config.anchor / labelled

    def squared_distance(self) -> Tensor:
        """||phi - phi_0||^2 of each member: (E,)."""
        return _squared(self._moved())

    def _moved(self) -> dict[str, Tensor]:
        return {name: value - self.anchors[name] for name, value in self.weights.items()}

    def update(self, pairs: Tensor, key: tuple[int | str, ...]) -> Metrics:
        """Stores oracle-labelled duels, (B, 2, D) winner first, and takes the round's steps on the buffer.

        Args:
            key: names the random stream that minibatches are drawn from.

        Returns:
            ``accuracy`` (mean over members) and ``accuracy_of_mean`` on the new duels and ``std`` of their reward
            difference, all before training; ``loss``, ``distance`` (mean ||phi - phi_0||), ``stored``, ``steps``.
        """
        metrics: Metrics = {}
        if len(pairs):
            rewards = self(pairs)
            margin = rewards[:, :, 0] - rewards[:, :, 1]  # (E, B)
            metrics["accuracy"] = float((margin > 0).float().mean())
            metrics["accuracy_of_mean"] = float((margin.mean(dim=0) > 0).float().mean())
            if self.config.members > 1:
                metrics["std"] = float(margin.std(dim=0).mean())
        self.buffer.add(pairs)
        if len(self.buffer) >= self.config.start and self.config.steps:
            draw = generator(self.seed, "replay", *key)
            metrics["loss"] = ranks.tell(self._train(draw) if ranks.rank() == 0 else None)
            self._share()
            with torch.no_grad():
                metrics["distance"] = float(self.squared_distance().sqrt().mean())
        return metrics | {"stored": float(len(self.buffer)), "steps": float(self.steps)}

    def _train(self, draw: np.random.Generator) -> float:
        """The round's steps; their mean loss."""
        losses = [self._step(self.buffer.sample(self.config.batch, draw)) for _ in range(self.config.steps)]
        return float(torch.stack(losses).mean())

    def _share(self) -> None:
        """Gives all ranks what rank 0 has learnt; its optimizer's moments stay with rank 0."""
        self.steps = ranks.tell(self.steps)
        with torch.no_grad():
            ranks.copy_from_first(self.weights.values())
        if self.steps % (CHECK_EVERY * self.config.steps) == 0:
            ranks.check_alike("the reward model's weights", self.weights.values())

    def _step(self, pairs: Tensor) -> Tensor:
        nll, pull = self.nll(pairs.to(self.device)), self.pull(self.buffer.added)
        with torch.no_grad():
            moved = self._moved()
            objective = nll + pull * _squared(moved)
        if not torch.isfinite(objective).all():
            raise FloatingPointError(
                f"the reward model's loss is {float(objective.mean())} at step {self.steps}; its weights were "
                f"left as they were. Lower reward_model.learning_rate (now {self.config.learning_rate}), or look for "
                "features of the encoder that are not finite"
            )
        self.optimizer.zero_grad(set_to_none=True)
        nll.sum().backward()  # a sum: each member follows its own objective, as if it were alone
        for name, value in self.weights.items():  # the pull's gradient, which is at hand: autograd takes six passes
            assert value.grad is not None
            value.grad.add_(moved[name], alpha=2 * pull)
        self.optimizer.step()
        self.steps += 1
        return objective.mean()

    def save(self, folder: Path) -> None:
        """Writes weights, anchors, Adam's moments, the buffer and the counters."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = dict(self.weights) | {f"anchor.{name}": value for name, value in self.anchors.items()}
        for name, value in self.weights.items():
            for moment, state in self.optimizer.state.get(value, {}).items():
                tensors[f"adam.{moment}.{name}"] = state
        save_file(
            {name: value.detach().contiguous() for name, value in tensors.items()}, folder / "ensemble.safetensors"
        )
        self.buffer.save(folder / "duels.safetensors")
        (folder / "ensemble.json").write_text(json.dumps({"steps": self.steps}))

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote.

        Raises:
            ValueError: another size of ensemble or of features.
        """
        tensors = load_file(folder / "ensemble.safetensors", device=str(self.device))
        for name, value in self.weights.items():
            for kept in (name, f"anchor.{name}", *(f"adam.{moment}.{name}" for moment in MOMENTS)):
                if kept in tensors:
                    tensors[kept] = self._by_member(tensors[kept])
            if tensors[name].shape != value.shape:
                raise ValueError(f"{name}: expected {tuple(value.shape)}, got {tuple(tensors[name].shape)}")
            value.data.copy_(tensors[name])
            self.anchors[name].copy_(tensors[f"anchor.{name}"])
            moments = {m: tensors[f"adam.{m}.{name}"] for m in ADAM if f"adam.{m}.{name}" in tensors}
            self.optimizer.state.pop(value, None)
            if moments:
                self.optimizer.state[value] = moments
        self.buffer.load(folder / "duels.safetensors")
        self.steps = json.loads((folder / "ensemble.json").read_text())["steps"]


    def _by_member(self, kept: Tensor) -> Tensor:
        """A tensor (E, ...) as it is; members side by side, (D, E * H) or (E * H,), as versions before 2026-12 kept the
        first layer, one behind the other."""
        e, h = self.config.members, self.config.hidden
        return kept if kept.ndim == 3 else kept.reshape(-1, e, h).transpose(0, 1).contiguous()


def _squared(moved: dict[str, Tensor]) -> Tensor:
    """Squared lengths of the members' vectors, which come in parts (E, ...): (E,)."""
    return torch.stack([part.square().sum(dim=(1, 2)) for part in moved.values()]).sum(dim=0)


def _truncated_normal(shape: tuple[int, ...], fan_in: int, draw: torch.Generator) -> Tensor:
    """Normal with standard deviation 1 / (2 sqrt(fan_in)), cut at two of them, as in the released code."""
    std = 0.5 / fan_in**0.5
    return torch.nn.init.trunc_normal_(torch.empty(shape), std=std, a=-2 * std, b=2 * std, generator=draw)
