"""Uniform: two samples of the reference policy duel, and nothing is learnt. The floor of every table."""

from __future__ import annotations

import numpy as np

from llm_duel_env.agents.base import Agent
from llm_duel_env.types import Duels, Metrics, Observation, Preferences


class Uniform(Agent):
    """Shows two samples of the reference policy (uniform over the candidates on finite tasks) and stays as it is."""

    def act(self, observation: Observation) -> Duels:
        """Two independent samples of the reference policy for each prompt."""
        pair = self.policy.sample(observation, 2, ("act", self.round), reference=True)
        return pair.first_two().noted("two samples of the reference policy")

    def learn(self, preferences: Preferences) -> Metrics:
        """Nothing."""
        return {}

    def respond(self, observation: Observation) -> np.ndarray:
        """A sample of the reference policy."""
        return self.policy.sample(observation, 1, ("respond",), reference=True, temperature=1.0).responses[:, 0]
