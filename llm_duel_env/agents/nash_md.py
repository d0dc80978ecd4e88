"""Nash-MD: Nash learning from human feedback (arXiv 2312.00886): a policy that no other policy beats.

The opponent is the geometric mixture, token by token, of the present policy and the reference: policy^(1 - m) ref^m.
The policy climbs the probability of beating it, less beta times the KL to the reference, by a policy gradient on the
label of the duel; no Bradley-Terry model is assumed, so intransitive oracles are no obstacle. Reconstructed from TRL's
trainer; where TRL's KL term is not the gradient of the KL, the unbiased form is the default.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_duel_env.agents.base import Agent, AgentConfig
from llm_duel_env.agents.losses.nash_md import NashMD as NashMDLoss
from llm_duel_env.tasks.base import TaskView
from llm_duel_env.types import Candidates, Duels, Metrics, Observation, Preferences

TEMPERATURE = 1.0
"""Of samples and opponents, whatever `policy.temperature` says: at any other the gradient would be biased."""


@dataclass(frozen=True)
class NashMDConfig(AgentConfig):
    """Defaults are TRL's, recalled: the paper's own constants could not be confirmed."""

    mixture: float = 0.5
    """m, the reference's weight in the opponent (TRL: 0.5); 0 is self-play, 1 duels with the reference."""
    beta: float = 0.1
    """Strength of the pull to the reference (TRL: 0.1)."""
    kl: str = "sequence"
    """The KL term's gradient: sequence, the unbiased one (ours), or token, TRL's."""


class NashMD(Agent):
    """A sample of the policy duels with one of the mixture; the policy takes a policy-gradient step on the label."""

    Config = NashMDConfig
    paper = "https://arxiv.org/abs/2312.00886"
    provenance = "reconstructed"
    config: NashMDConfig

    def __init__(self, task: TaskView, config: NashMDConfig, *, seed: int, budget: int) -> None:
        if config.kl not in ("sequence", "token") or not 0 <= config.mixture <= 1:
            got = f"{config.kl!r}, {config.mixture}"
            raise ValueError(f"expected kl sequence or token and mixture in [0, 1], got {got}")
        super().__init__(task, config, seed=seed, budget=budget)
        self.loss = NashMDLoss(config.beta, per_token=config.kl == "token")

    def act(self, observation: Observation) -> Duels:
        """A sample of the policy, shown first, and one of the mixture."""
        own = self.policy.sample(observation, 1, ("act", self.round), temperature=TEMPERATURE)
        key, mixture = ("opponent", self.round), self.config.mixture
        opponent = self.policy.sample(observation, 1, key, temperature=TEMPERATURE, mixture=mixture)
        reason = f"a sample of the policy against one of its mixture with the reference (weight {mixture:g})"
        return Candidates.beside(own, opponent).first_two().noted(reason)

    def learn(self, preferences: Preferences) -> Metrics:
        """Policy-gradient steps on all labels, ties among them: there z = 1/2 leaves the pull to the reference."""
        labelled = preferences.rows(~np.isnan(preferences.first_wins))
        if not len(labelled):
            return {}
        won = np.stack([labelled.first_wins, 1 - labelled.first_wins], axis=1)
        key = ("update", self.round)
        return self.policy.learn(self.loss, labelled.pair, progress=self.progress, key=key, scores=won)
