"""What an agent's reward models believe of responses, held against what the oracle would say.

At evaluations an agent that has reward models is asked for the rewards they give to responses to held-out prompts; it
is told nothing. Two things are made of the answers. Over-optimisation: how often it believes the deployed response to
beat the reference, beside how often that is so. Calibration, on pairs that the agent's learning has not moved: the
stored reference and further samples of the reference policy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit

from llm_duel_env import ranks
from llm_duel_env.benchmark.calibration import calibration
from llm_duel_env.benchmark.results import BELIEFS
from llm_duel_env.oracles.checked import compare
from llm_duel_env.oracles.feedback import Feedback
from llm_duel_env.tasks.base import Task
from llm_duel_env.types import Metrics, Observation, batch_size, rows_of

EVERY = 0.125
"""Share of the budget between two examinations: all of them cost less than a tenth of a run's evaluations."""
OTHERS, OTHERS_AT_END = 1, 4
"""Samples of the reference policy that are paired with a prompt's reference response."""
PROMPTS = 96
"""The most prompts of an examination."""


class Examiner:
    """Examines one agent again and again, and keeps the points of its curves."""

    def __init__(self, task: Task, feedback: Feedback) -> None:
        self.task, self.feedback = task, feedback
        self.points: list[dict[str, float | None]] = []
        """One per examination: ``queries``, and what of `BELIEFS` is known."""
        self._fixed: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        """The pairs that calibration is measured on, by their number; drawn again on resume."""

    def due(self, agent: Any, queries: int, budget: int, *, last: bool) -> bool:
        """Whether an evaluation after `queries` is to be one of these."""
        if not agent.believes:
            return False
        before = max((point["queries"] or 0 for point in self.points), default=-budget)
        return last or int(queries / (EVERY * budget) + 1e-9) > int(before / (EVERY * budget) + 1e-9)

    def examine(
        self,
        agent: Any,
        prompts: Observation,
        deployed: np.ndarray,
        measured: dict[str, np.ndarray],
        queries: int,
        *,
        last: bool = False,
    ) -> Metrics:
        """One examination; called on all ranks, and only the first asks the oracle and returns something.

        Args:
            agent: see `Agent.beliefs`.
            prompts: M held-out prompts.
            deployed: (M,) the deployed responses to them.
            measured: of `evaluate_prompts`, for these prompts and perhaps more after them.
            queries: bought so far.
            last: of the run, where more pairs are looked at.

        Returns:
            What of `BELIEFS` is known, under ``belief/``.
        """
        stored = self.task.reference(prompts["prompt_id"])
        rows = np.flatnonzero([text is not None for text in ([] if stored is None else stored)])[:PROMPTS]
        if stored is None or not len(rows):  # so it stays in this run
            return {}
        prompts, deployed, reference = rows_of(prompts, rows), deployed[rows], stored[rows]
        others, says = self._others(agent, prompts, reference, OTHERS_AT_END if last else OTHERS)
        rewards = agent.beliefs(prompts, np.column_stack([deployed, reference, others]))  # (E, M, 2 + others)
        if ranks.rank() > 0:
            self.points.append({"queries": queries})
            return {}
        margin = rewards[:, :, 0] - rewards[:, :, 1]
        found: Metrics = {
            "believed": float(expit(margin).mean()),
            "labelled": self._mean_label(measured.get("offline_win_probability"), rows),
            "true": self._mean_label(measured.get("true_win_probability"), rows),
            "margin": float(margin.mean()),
            "spread": float(margin.std(axis=0).mean()),
        }
        pairs = (rewards[:, :, 1:2] - rewards[:, :, 2:]).reshape(len(rewards), -1)  # (E, M * others)
        found |= calibration(expit(pairs).mean(axis=0), pairs.std(axis=0), says.ravel())
        found = {name: value for name, value in found.items() if np.isfinite(value)}
        self.points.append({"queries": queries, **found})
        return {f"belief/{name}": value for name, value in found.items()}

    def curves(self) -> dict[str, list[float | None]] | None:
        """Queries and values by name, for the result; None where nothing was examined."""
        if not self.points:
            return None
        known = [name for name in BELIEFS if any(point.get(name) is not None for point in self.points)]
        return {name: [point.get(name) for point in self.points] for name in ("queries", *known)}

    def _mean_label(self, probability: np.ndarray | None, rows: np.ndarray) -> float:
        if probability is None:
            return float("nan")
        return float(self.feedback.expected_label(probability[rows]).mean())

    def _others(
        self, agent: Any, prompts: Observation, reference: np.ndarray, number: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples of the reference policy, (M, number), and the probability of a label that prefers the reference to
        each, NaN where it is not known."""
        count = batch_size(prompts), number
        if count not in self._fixed:
            key = ("calibration",)
            drawn = agent.policy.sample(prompts, number, key, reference=True, temperature=1.0).responses
            says = ranks.lead(self._labels(prompts, reference, drawn)) if ranks.rank() == 0 else ranks.follow()
            self._fixed[count] = drawn, says
        return self._fixed[count]

    def _labels(self, prompts: Observation, reference: np.ndarray, others: np.ndarray) -> np.ndarray:
        if self.task.oracle.metered:
            return np.full(others.shape, np.nan)
        columns = [compare(self.task.oracle, prompts, reference, column) for column in others.T]
        return self.feedback.expected_label(np.stack(columns, axis=1))
