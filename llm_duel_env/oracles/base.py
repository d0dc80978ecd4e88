"""What an oracle is: something that says how probable it is that one response beats another."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from llm_duel_env.types import Observation


class OracleError(RuntimeError):
    """An oracle gave no usable answer (a NaN score, a wrong count, ...). Raised before any label is recorded."""


class Oracle(ABC):
    """Says which of two responses is better.

    `prompts` is a batch observation of M prompts; responses are (M,) arrays: str (dtype object) on text tasks,
    indices of recorded responses (int64) on finite tasks.
    """

    has_utility: bool = False
    """True where every preference follows from one number per response, so that `utility` may be called."""

    @abstractmethod
    def win_probability(self, prompts: Observation, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """P(first beats second): float64 (M,) in [0, 1]."""

    def utility(self, prompts: Observation, responses: np.ndarray) -> np.ndarray:
        """The utility of each response, float64 (M,), in logits of a Bradley-Terry model.

        Raises:
            OracleError: this oracle has no utility (`has_utility` is False).
        """
        raise OracleError(f"{type(self).__name__} compares pairs only: no utility explains its preferences")

    def optimal_win_probability(self, prompts: Observation, responses: np.ndarray) -> np.ndarray | None:
        """P(the von Neumann winner beats the response), float64 (M,), where it is known otherwise than by a utility.

        None, the default, says that it is not: regret then comes from utilities and the task's optimum.
        """
        return None
