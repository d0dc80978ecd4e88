"""What the studies of a suite's kept results share: the results by world, label and seed, and how to tell them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llm_duel_env.benchmark import statistics
from llm_duel_env.benchmark.results import Result, has_win_rate, paired_enough, win_curve
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.statistics import Interval
from llm_duel_env.benchmark.stored import Kept

BySeed = Mapping[int, Result]
World = tuple[str, dict[str, Any]]
"""Environment and its settings."""


def gathered(runs: Sequence[RunConfig], kept: Kept) -> list[tuple[World, dict[str, BySeed]]]:
    """What is kept of the runs, by label and seed, for each environment with its settings."""
    worlds: dict[str, tuple[World, dict[str, dict[int, Result]]]] = {}
    for run in runs:
        key = json.dumps([run.env, run.env_kwargs], sort_keys=True)
        _, by_label = worlds.setdefault(key, ((run.env, run.env_kwargs), {}))
        result = kept.result(run)
        if result is not None and has_win_rate(result):
            by_label.setdefault(run.label, {})[run.seed] = result
    return [(world, dict(by_label)) for world, by_label in worlds.values()]


def ends(by_seed: BySeed) -> dict[int, float]:
    """The final offline win rate of each seed."""
    return {seed: float(win_curve(result)[1][-1]) for seed, result in by_seed.items()}


def difference(ours: BySeed, theirs: BySeed) -> Interval | None:
    """The paired difference of final win rates; None with fewer seeds than an interval needs."""
    return statistics.paired_difference(ends(ours), ends(theirs)) if paired_enough(ours, theirs) else None


def heading(world: World) -> str:
    """The environment, with its settings where it has any."""
    env, env_kwargs = world
    return f"{env} {json.dumps(env_kwargs, sort_keys=True)}" if env_kwargs else env


def told_interval(found: Interval | None) -> str:
    """A difference and its interval, signed; a dash for None."""
    return "–" if found is None else f"{found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
