"""RDO: reward difference optimization (arXiv 2408.09385): a duel teaches as much as the scores of its two sides differ.

Reconstructed from the abstract and notes. The paper weighs the losses of offline data; here the pairs are the present
policy's, as online DPO's are, so that the weight is all that differs. Its second way to the weights, a model that reads
both responses and regresses the difference, is left out: the oracle's own scores are at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Duels, Metrics, Observation, Preferences


@dataclass(frozen=True)
class RDOConfig(AgentConfig):
    """The paper's constants could not be confirmed."""

    beta: float = 0.1
    """Strength of the pull to the reference policy (as online DPO's)."""


class RDO(Agent):
    """Online DPO whose pairs weigh by max(0, r_w - r_l), with mean 1 over a batch; a label against the scores weighs
    nothing."""

    Config = RDOConfig
    paper = "https://arxiv.org/abs/2408.09385"
    provenance = "reconstructed"
    needs = frozenset({"scores"})
    config: RDOConfig

    def __init__(self, task: TaskView, config: RDOConfig, *, seed: int, budget: int) -> None:
        super().__init__(task, config, seed=seed, budget=budget)
        self.optimizer = direct_optimizer("rdo", config.beta, gives=self.needs)

    def act(self, observation: Observation) -> Duels:
        """Two independent samples of the present policy for each prompt."""
        pair = self.policy.sample(observation, 2, ("act", self.round))
        return pair.first_two().noted("two samples of the present policy")

    def learn(self, preferences: Preferences) -> Metrics:
        """One pass of weighted DPO over the round's labelled pairs."""
        return self.policy.update(
            self.optimizer,
            preferences,
            progress=self.progress,
            key=("update", self.round),
            scores=preferences.scores,
        )
