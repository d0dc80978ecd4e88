"""Online DPO (OAIF): direct alignment from online feedback (arXiv 2402.04792, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from llm_duel_env.agents.base import Agent, AgentConfig, Provenance
from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Duels, Metrics, Observation, Preferences


@dataclass(frozen=True)
class OnlineDPOConfig(AgentConfig):
    """Defaults are those that SEA's comparison used (arXiv 2411.01493, App. D)."""

    loss: str = "dpo"
    """Direct optimizer, one of `llm-duel list losses` that needs no scores (the paper's method takes any)."""
    beta: float = 0.1
    """Strength of the pull to the reference policy (SEA's paper: DPO 0.1, SLiC 0.2, IPO 0.2 to 1)."""
    loss_options: dict = field(default_factory=dict)
    """The loss's own settings by name; those not named keep its defaults."""


class OnlineDPO(Agent):
    """Two samples of the present policy duel; the policy takes a direct-optimizer step on the label."""

    Config = OnlineDPOConfig
    paper = "https://arxiv.org/abs/2402.04792"
    provenance: ClassVar[Provenance] = "paper"
    config: OnlineDPOConfig

    def __init__(self, task: TaskView, config: OnlineDPOConfig, *, seed: int, budget: int) -> None:
        super().__init__(task, config, seed=seed, budget=budget)
        self.optimizer = direct_optimizer(config.loss, config.beta, config.loss_options)

    def act(self, observation: Observation) -> Duels:
        """Two independent samples for each prompt."""
        pair = self.policy.sample(observation, 2, ("act", self.round))
        return pair.first_two().noted("two samples of the present policy")

    def learn(self, preferences: Preferences) -> Metrics:
        """One pass of the direct optimizer over the round's labelled pairs."""
        return self.policy.update(self.optimizer, preferences, progress=self.progress, key=("update", self.round))
