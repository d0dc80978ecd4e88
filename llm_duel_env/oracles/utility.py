"""An oracle made of one number per response: Bradley-Terry preferences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import expit

from llm_duel_env.oracles.base import Oracle
from llm_duel_env.types import Observation


class UtilityOracle(Oracle):
    """P(first beats second) = sigmoid(scale (u(first) - u(second))) for a utility function u."""

    has_utility = True

    def __init__(self, utility: Callable[[Observation, np.ndarray], np.ndarray], scale: float = 1.0) -> None:
        """An oracle that prefers what has more utility.

        Args:
            utility: Gives each of M responses its utility: (observation, (M,) responses) -> (M,) float64.
            scale: Inverse temperature: how many logits one unit of utility is worth.

        Raises:
            ValueError: a scale that is not a positive number.
        """
        if not 0 < scale < np.inf:
            raise ValueError(f"scale: expected a positive number, got {scale}")
        self._utility, self.scale = utility, float(scale)

    def utility(self, prompts: Observation, responses: np.ndarray) -> np.ndarray:
        """scale * u of each response: float64 (M,), in logits."""
        return self.scale * np.asarray(self._utility(prompts, responses), np.float64)

    def win_probability(self, prompts: Observation, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """P(first beats second): float64 (M,)."""
        return expit(self.utility(prompts, first) - self.utility(prompts, second))
