"""Offline DPO as SEA compares with it (arXiv 2411.01493, Sec. 6.1): duels between samples of the supervised policy."""

from __future__ import annotations

from llm_duel_env.agents.online_dpo import OnlineDPO
from llm_duel_env.types import Duels, Observation


class OfflineDPO(OnlineDPO):
    """Online DPO whose duels never follow the policy: both responses come from the reference policy.

    This is policy-generated, oracle-labelled data, as in SEA's comparison, and not DPO on a public human data set.
    """

    paper = "https://arxiv.org/abs/2305.18290"
    provenance = "paper"

    def act(self, observation: Observation) -> Duels:
        """Two independent samples of the reference policy for each prompt."""
        pair = self.policy.sample(observation, 2, ("act", self.round), reference=True)
        return pair.first_two().noted("two samples of the reference policy, whatever has been learnt")
