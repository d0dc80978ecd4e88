"""What a language-model policy asks of its learner, and how one is chosen."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.learners.loop import Engine
from llm_duel_env.agents.policies.learners.torch_learner import TorchLearner


class Learner(Engine, Protocol):
    """An engine with the optimizer's state. With several ranks every method but `begin` is called on all of them."""

    gradient_steps: int
    """Optimizer steps taken, those before a `reset` included."""
    uniform: bool
    """Whether all ranks must call the model's layers alike while they train (ZeRO 3)."""

    def add(self, name: str, module: nn.Module) -> None:
        """Trains a module beside the model, with its optimizer and clipping; its weights are its owner's to save."""

    def whole(self) -> AbstractContextManager[None]:
        """Within the block the model has all of its weights on this rank and can be called freely, without gradient."""

    def weights(self) -> dict[str, Tensor]:
        """The model's weights by name, those that train as the optimizer has them (float32). Empty but on rank 0."""

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Puts weights into the model and the optimizer. Names that are left out keep theirs."""

    def reset(self) -> None:
        """Forgets the optimizer's moments; the count of steps goes on."""

    def save(self, folder: Path) -> None:
        """Writes the optimizer's state into a folder that is there; what ranks other than 0 are given is not kept."""

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote. ValueError where it belongs to other parameters."""


def make_learner(model: PreTrainedModel, config: PolicyConfig) -> Learner:
    """The learner that `PolicyConfig.learner` names.

    Raises:
        ValueError: there is no such learner, or its settings contradict the policy's.
        MissingExtraError: it needs a package that is not installed.
    """
    if config.learner == "torch":
        return TorchLearner(model, config)
    from llm_duel_env.agents.policies.learners.deepspeed_learner import DeepSpeedLearner

    return DeepSpeedLearner(model, config)
