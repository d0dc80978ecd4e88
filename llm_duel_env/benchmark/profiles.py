"""Bands over runs: performance profiles and sample-efficiency curves, after rliable (arXiv 2108.13264).

Every band resamples whole runs: one draw of runs serves all points of a curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from llm_duel_env.benchmark.statistics import values_at
from llm_duel_env.randomness import generator

RESAMPLES = 2000
POINTS = 51
"""Of the grid that the curves of a table are read off at."""
Statistic = Literal["mean", "iqm"]


@dataclass(frozen=True)
class Band:
    """A curve with the ends of its pointwise bootstrap interval; all (G,)."""

    at: np.ndarray
    """Where: scores, or queries."""
    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: int
    """Runs it rests on."""


def performance_profile(
    scores: Sequence[float] | np.ndarray, levels: np.ndarray, *, seed: int = 0, level: float = 0.95
) -> Band:
    """The share of runs whose score is above each of `levels` (G,): rliable's run-score distribution.

    >>> performance_profile([0.2, 0.6, 0.9], np.array([0.0, 0.5, 0.9])).estimate.round(3).tolist()
    [1.0, 0.667, 0.0]
    """
    runs = np.asarray(scores, np.float64)
    if runs.ndim != 1 or not len(runs):
        raise ValueError(f"performance_profile: expected one score per run, got shape {runs.shape}")
    levels = np.asarray(levels, np.float64)
    return _band(levels, (runs[:, None] > levels).astype(np.float64), "mean", seed, level)


def sample_efficiency(
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
    grid: np.ndarray,
    statistic: Statistic = "iqm",
    *,
    seed: int = 0,
    level: float = 0.95,
) -> Band:
    """The interquartile mean, or the mean, over runs of their curves at the queries of `grid` (G,)."""
    if not curves:
        raise ValueError("sample_efficiency: expected at least one curve")
    grid = np.asarray(grid, np.float64)
    return _band(grid, values_at(curves, grid), statistic, seed, level)


def common_grid(budget: float) -> np.ndarray:
    """The queries at which the curves of a table are compared: (POINTS,), from none to the whole budget."""
    return np.linspace(0.0, budget, POINTS)


def _band(at: np.ndarray, values: np.ndarray, statistic: Statistic, seed: int, level: float) -> Band:
    """Of runs' values (n, G)."""
    n = len(values)
    rows = generator(seed, "band", n).integers(0, n, (RESAMPLES, n))
    samples = _over_runs(values[rows], statistic)  # (RESAMPLES, G)
    low, high = np.percentile(samples, [50 * (1 - level), 50 * (1 + level)], axis=0)
    return Band(at, _over_runs(values, statistic), low, high, n)


def _over_runs(values: np.ndarray, statistic: Statistic) -> np.ndarray:
    """(..., n, G) -> (..., G)."""
    return values.mean(axis=-2) if statistic == "mean" else np.asarray(stats.trim_mean(values, 0.25, axis=-2))
