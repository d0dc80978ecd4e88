"""Best against worst by the ensemble's mean: SEA without uncertainty. Does Thompson sampling earn its keep?"""

from __future__ import annotations

from torch import Tensor

from llm_duel_env.agents import selection
from llm_duel_env.agents.sea import SEA
from llm_duel_env.types import Observation


class BestVersusWorst(SEA):
    """SEA whose duels are the candidate with the highest mean reward against the one with the lowest."""

    provenance = "ours"

    @property
    def rule(self) -> str:
        """How a duel is chosen, in words."""
        return "the highest against the lowest mean reward over the members"

    def choose(self, rewards: Tensor, identity: Tensor, observation: Observation) -> tuple[Tensor, Tensor]:
        """The extremes of the mean over members, (M,) and (M,); `opponent` and `uncertainty` play no part."""
        return selection.best_and_worst(rewards.mean(dim=0), identity, self.draw("tie", observation))
