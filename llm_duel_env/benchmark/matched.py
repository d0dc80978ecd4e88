"""Win rate at matched KL to the reference: what a method makes of each nat it moves away.

Two methods that end alike may have paid differently for it in drift from the supervised policy. Each run's curve of
(KL, win rate) is read off at common levels of KL, where it first reaches them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from llm_duel_env.benchmark import statistics
from llm_duel_env.benchmark.leaderboard import Table, baseline_of
from llm_duel_env.benchmark.results import Result, kl_curve, win_curve
from llm_duel_env.benchmark.statistics import SEEDS_NEEDED, Interval

LEVELS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
"""Levels of KL, in nats, that tables are read off at."""


@dataclass(frozen=True)
class AtLevel:
    """One agent at one level of KL."""

    win_rate: float
    """Mean over seeds."""
    interval: tuple[float, float] | None
    """95% bootstrap interval over seeds; None with too few seeds."""
    difference: Interval | None
    """Less online DPO at the same level, paired by seed; None for itself, where it does not get there, and with too few
    seeds."""


@dataclass(frozen=True)
class Matched:
    """A table's agents at common levels of KL."""

    levels: tuple[float, ...]
    """Those of `LEVELS` that two agents or more reach with all their seeds."""
    agents: dict[str, dict[float, AtLevel]] = field(default_factory=dict)
    """Label -> level -> what was read off; a level that some seed never reaches is not there."""


def matched(table: Table, levels: tuple[float, ...] = LEVELS) -> Matched:
    """The table's agents at matched KL; no levels where the task or the agents know no KL."""
    enough = SEEDS_NEEDED[table.kind]
    read = {row.label: read_off(table.results[row.label], levels) for row in table.rows}
    baseline = baseline_of(table.results)
    theirs = read.get(baseline) if baseline in read else None
    if theirs is None and baseline is not None:  # the table's rows are a selection without it
        theirs = read_off(table.results[baseline], levels)
    kept = tuple(level for level in levels if sum(level in found for found in read.values()) > 1)
    agents: dict[str, dict[float, AtLevel]] = {}
    for label, found in read.items():
        agents[label] = {}
        for level in kept:
            if level not in found:
                continue
            by_seed = found[level]
            interval = statistics.bootstrap_interval(list(by_seed.values())) if len(by_seed) >= enough else None
            difference = None
            if label != baseline and theirs and len(set(by_seed) & set(theirs.get(level, {}))) >= enough:
                difference = statistics.paired_difference(by_seed, theirs[level])
            ends = (interval.low, interval.high) if interval else None
            agents[label][level] = AtLevel(float(np.mean(list(by_seed.values()))), ends, difference)
    return Matched(kept, agents)


def read_off(by_seed: Mapping[int, Result], levels: tuple[float, ...]) -> dict[float, dict[int, float]]:
    """Level -> seed -> win rate, for the levels that every seed reaches: a mean over those that do alone would be one
    over a selection."""
    found: dict[float, dict[int, float]] = {}
    for level in levels:
        values = {}
        for seed, result in by_seed.items():
            kl = kl_curve(result)
            values[seed] = None if kl is None else value_at(level, kl[1], win_curve(result)[1])
        known = {seed: value for seed, value in values.items() if value is not None}
        if known and len(known) == len(values):
            found[level] = known
    return found


def value_at(level: float, kl: np.ndarray, values: np.ndarray) -> float | None:
    """The value where `kl` first reaches `level`, by linear interpolation from the evaluation before; None where it
    never does.

    Args:
        level: in nats.
        kl: (G,) at each evaluation.
        values: (G,).

    >>> value_at(1.0, np.array([0.0, 2.0, 0.5]), np.array([0.5, 0.7, 0.9]))
    0.6
    >>> value_at(3.0, np.array([0.0, 2.0, 0.5]), np.array([0.5, 0.7, 0.9])) is None
    True
    """
    if kl.shape != values.shape or kl.ndim != 1:
        raise ValueError(f"value_at: expected one value per KL, got shapes {kl.shape} and {values.shape}")
    reached = np.flatnonzero(kl >= level)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0:
        return float(values[0])
    share = (level - kl[i - 1]) / (kl[i] - kl[i - 1])
    return float(values[i - 1] + share * (values[i] - values[i - 1]))
