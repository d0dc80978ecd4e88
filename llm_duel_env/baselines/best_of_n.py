"""Best of n with a frozen policy: only a reward model learns (SEA's ablation, variant 7; arXiv 2402.00396).

Efficient exploration as in Dwaracherla et al. (arXiv 2402.00396), as SEA's comparison has it (arXiv 2411.01493, App.
D): candidates come from the supervised policy for ever, double Thompson sampling chooses the duel, and the deployed
response is the ensemble's favourite among n samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from llm_duel_env.agents import selection
from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.agents.reward_models.ensemble import EnsembleConfig, EnsembleRewardModel
from llm_duel_env.agents.reward_models.use import belief, beliefs_of, best_of, prompt_draws, rewards_of, winners_first
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Duels, Metrics, Observation, Preferences


@dataclass(frozen=True)
class BestOfNConfig(AgentConfig):
    """Defaults are those of SEA's comparison. Of the policy's settings only the temperature plays a part."""

    candidates: int = 20
    """N, responses of the supervised policy per prompt (SEA's comparison: 20)."""
    best_of: int = 10
    """n, samples of the supervised policy that the deployed response is chosen from (released code: 10)."""
    reward_model: EnsembleConfig = field(default_factory=EnsembleConfig)
    """The epistemic reward model."""


class BestOfN(Agent):
    """Learns whom to prefer, and never how to write."""

    Config = BestOfNConfig
    paper = "https://arxiv.org/abs/2411.01493"
    provenance = "paper"
    believes = True
    config: BestOfNConfig

    def __init__(self, task: TaskView, config: BestOfNConfig, *, seed: int, budget: int) -> None:
        if config.candidates < 2 or config.best_of < 1:
            raise ValueError(f"expected candidates >= 2, best_of >= 1, got {config.candidates}, {config.best_of}")
        super().__init__(task, config, seed=seed, budget=budget)
        self.reward_model = EnsembleRewardModel(self.policy.feature_size, config.reward_model, seed=seed)
        self._features = torch.empty(0, 2, self.policy.feature_size)  # of the pairs of the last `act`

    def act(self, observation: Observation) -> Duels:
        """Double Thompson sampling among samples of the supervised policy."""
        candidates = self.policy.sample(observation, self.config.candidates, ("act", self.round), reference=True)
        features = self.policy.embed(candidates)  # (M, N, D)
        with self.clock("select"):
            identity = torch.from_numpy(selection.identities(candidates.responses))
            rewards = rewards_of(self.reward_model, features, identity)  # (E, M, N)
            draws = prompt_draws(self.seed, f"best_of_n/{self.round}", observation, len(rewards) + 2)
            first = selection.thompson(rewards, (draws[:, 0] * len(rewards)).long())
            same, orders = selection.same_as(identity, first), draws[:, 2:].argsort(dim=1)
            second = selection.second_thompson(rewards, first, orders, same, draws[:, 1])
        self._features = features[torch.arange(len(first))[:, None], torch.stack([first, second], dim=1)]
        reason = "Thompson winner of a member against the first different winner of the others (policy frozen)"
        return candidates.duel(first.numpy(), second.numpy()).noted(reason, *belief(rewards, first, second))

    def learn(self, preferences: Preferences) -> Metrics:
        """The ensemble learns from the round's labels; the policy stays as it is."""
        with self.clock("erm"):
            erm = self.reward_model.update(winners_first(self._features, preferences), (self.round,))
        return {f"erm/{name}": value for name, value in erm.items()}

    def respond(self, observation: Observation) -> np.ndarray:
        """The best of n samples of the supervised policy in the eyes of the whole ensemble."""
        candidates = self.policy.sample(observation, self.config.best_of, ("respond", self.round), reference=True)
        return best_of(candidates, self.policy, self.reward_model)

    def beliefs(self, observation: Observation, responses: np.ndarray) -> np.ndarray:
        """See `Agent.beliefs`: of the ensemble's members."""
        return beliefs_of(self.policy, self.reward_model, observation, responses)

    def save(self, folder: Path) -> None:
        """Everything `Agent.save` writes, and the ensemble with its duels."""
        super().save(folder)
        self.reward_model.save(folder / "reward_model")

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        super().load(folder)
        self.reward_model.load(folder / "reward_model")
