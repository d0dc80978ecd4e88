"""SPO: self-supervised preference optimization (arXiv 2409.17791): DPO, and telling how far a response was degraded.

Reconstructed: the abstract says that the alignment loss gets a self-supervised loss of "preference degree" beside it.
That key content is removed in several amounts, and that a head on the final hidden state classifies the amount for
winner and loser, is recalled. Not to be confused with self-play preference optimization, which others call SPO too.

The degrader is the task's (the paper's removes extracted key words). One that knows which content is worth most, as
TinyTLDR's does, tells more than labels do, so the agent stands in a table of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.agents.policies.final_states import final_states
from llm_duel_env.agents.policies.ranked import DirectOptimizer, RankedLogProbs, needs_tokens
from llm_duel_env.randomness import generator
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences

if TYPE_CHECKING:  # it brings transformers with it
    from llm_duel_env.agents.policies.language_model import LanguageModelPolicy

LEVELS = 5
"""Levels that a task's degrader knows: 0 (as it was) to 4."""


@dataclass(frozen=True)
class SPOConfig(AgentConfig):
    """The paper's constants could not be confirmed."""

    gamma: float = 0.1
    """Weight of the self-supervised loss (ours); 0 is online DPO."""
    loss: str = "dpo"
    """Direct optimizer, one of `llm-duel list losses` that needs no scores (paper: dpo and others)."""
    beta: float = 0.1
    """Strength of the pull to the reference policy (as online DPO's)."""
    loss_options: dict = field(default_factory=dict)
    """The loss's own settings by name; those not named keep its defaults."""


@dataclass(frozen=True)
class WithLevels:
    """loss + gamma * cross-entropy of the level that the head finds in each row's two degraded responses."""

    loss: DirectOptimizer
    gamma: float
    logits: Callable[[np.ndarray], Tensor]
    """Of the responses of some rows, (b,) numbers: (b, 2, LEVELS), with gradient."""
    levels: Tensor
    """(B, 2) int64, the levels of all rows."""

    @property
    def needs_tokens(self) -> bool:
        """The loss's."""
        return needs_tokens(self.loss)

    def __call__(self, ranked: RankedLogProbs, /) -> tuple[Tensor, Metrics]:
        """The sum; adds the metrics ``level_loss`` and ``level_accuracy``."""
        value, metrics = self.loss(ranked)
        if self.gamma == 0:
            return value, metrics
        if ranked.index is None:
            raise ValueError("SPO needs to know which rows a microbatch holds: expected their index, got None")
        logits, levels = self.logits(ranked.index.cpu().numpy()), self.levels[ranked.index]
        auxiliary = nn.functional.cross_entropy(logits.flatten(0, 1), levels.flatten())
        found = float((logits.argmax(-1) == levels).float().mean())
        told = {"level_loss": float(auxiliary.detach()), "level_accuracy": found}
        return value + self.gamma * auxiliary, metrics | told


class SPO(Agent):
    """Online DPO with an auxiliary task: of each winner and loser, degraded by a random level, tell the level."""

    Config = SPOConfig
    paper = "https://arxiv.org/abs/2409.17791"
    provenance = "reconstructed"
    needs = frozenset({"degrader"})
    kinds = frozenset({"text"})
    config: SPOConfig

    def __init__(self, task: TaskView, config: SPOConfig, *, seed: int, budget: int) -> None:
        if not config.gamma >= 0:
            raise ValueError(f"gamma: expected at least 0, got {config.gamma}")
        super().__init__(task, config, seed=seed, budget=budget)
        self.language_model = cast("LanguageModelPolicy", self.policy)  # as on every text task
        self.optimizer = direct_optimizer(config.loss, config.beta, config.loss_options)
        size = self.language_model.model.config.get_text_config().hidden_size
        self.head = nn.utils.skip_init(nn.Linear, size, LEVELS).to(self.language_model.device)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)  # the first step teaches the head alone; no draw of a global generator
        self.language_model.learner.add("level_head", self.head)

    def act(self, observation: Observation) -> Duels:
        """Two independent samples for each prompt."""
        return self.policy.sample(observation, 2, ("act", self.round)).first_two()

    def degraded(self, ranked: Candidates) -> tuple[Candidates, np.ndarray]:
        """Each response at a random level, (B, 2), and the levels, (B, 2) int64."""
        assert self.task.degrade is not None  # the task provides a degrader
        levels = generator(self.seed, "spo", self.round).integers(LEVELS, size=ranked.shape)
        texts = np.empty(ranked.shape, object)
        for row, prompt in enumerate(ranked.observation["prompt"]):
            for column in (0, 1):
                texts[row, column] = self.task.degrade(prompt, ranked.responses[row, column], int(levels[row, column]))
        return self.language_model.from_text(ranked.observation, texts), levels

    def learn(self, preferences: Preferences) -> Metrics:
        """One pass of both losses over the round's labelled pairs."""
        decided = preferences.decided()
        if not len(decided):
            return {}
        ranked = decided.ordered()
        versions, levels = self.degraded(ranked)

        def logits(rows: np.ndarray) -> Tensor:
            return self.head(final_states(self.language_model, versions.rows(rows)))

        target = torch.from_numpy(levels).to(self.language_model.device)
        loss = WithLevels(self.optimizer, self.config.gamma, logits, target)
        return self.policy.learn(loss, ranked, progress=self.progress, key=("update", self.round))

    def save(self, folder: Path) -> None:
        """Everything `Agent.save` writes, and the head."""
        super().save(folder)
        save_file({name: value.cpu() for name, value in self.head.state_dict().items()}, folder / "head.safetensors")

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        super().load(folder)
        self.head.load_state_dict(load_file(folder / "head.safetensors"))
