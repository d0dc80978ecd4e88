"""What an oracle is: something that says how probable it is that one response beats another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from llm_duel_env.types import Metrics, Observation


class OracleError(RuntimeError):
    """An oracle gave no usable answer (a NaN score, a wrong count, ...). Raised before any label is recorded."""


class OracleStopped(OracleError):  # noqa: N818 (an exception that says what happened)
    """Whoever answers asked to stop. Nothing is lost: the run goes on with --resume."""


class Oracle(ABC):
    """Says which of two responses is better.

    `prompts` is a batch observation of M prompts; responses are (M,) arrays: str (dtype object) on text tasks,
    indices of recorded responses (int64) on finite tasks.
    """

    has_utility: bool = False
    """True where every preference follows from one number per response, so that `utility` may be called."""

    metered: bool = False
    """True where every answer costs money or somebody's time: it is asked for labels alone, and win rates are not known
    unless the task has a `truth` with a utility."""

    may_skip: bool = False
    """True where `win_probability` may be NaN, which says that this duel gets no label: it is not charged."""

    @abstractmethod
    def win_probability(self, prompts: Observation, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """P(first beats second): float64 (M,) in [0, 1]; NaN for a duel that is skipped, where `may_skip`."""

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

    def open(self, folder: Path) -> None:  # noqa: B027 (most oracles remember nothing)
        """A run begins or goes on, with its ledger in `folder`: the place for what an oracle must not ask twice.

        May be called again, after `close` or with another folder.
        """

    def close(self) -> None:  # noqa: B027
        """The run is over, or stops for now: files and connections are let go. What was learnt stays."""

    def usage(self) -> Metrics:
        """What was spent so far, by name (requests, tokens, cost, ...); nothing where nothing is counted."""
        return {}
