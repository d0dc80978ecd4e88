"""The report's bars: figures with their intervals on a common axis, in per cent of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llm_duel_env.benchmark import statistics
from llm_duel_env.benchmark.leaderboard import BASELINE, Table
from llm_duel_env.benchmark.report.html_table import between
from llm_duel_env.benchmark.results import queries_reached
from llm_duel_env.benchmark.statistics import SEEDS_NEEDED, SHARE_OF_GAIN


@dataclass(frozen=True)
class Bar:
    """One agent's figure."""

    label: str
    text: str
    """The figure, its interval, and n."""
    at: float
    low: float | None
    high: float | None
    censored: str = ""
    """What to say where the figure is only a bound."""


@dataclass(frozen=True)
class Bars:
    """Bars on a common axis."""

    name: str
    """Part of ids."""
    title: str
    about: str
    ticks: list[tuple[float, str]]
    bars: list[Bar]
    zero: float | None = None
    """Where no difference is; None where bars grow from the left."""


def target_bars(table: Table) -> Bars | None:
    """Queries to target, fewest first, and which are censored; None without a target."""
    bars = []
    for row in sorted(table.rows, key=lambda row: (row.queries_to_target or 0.0, row.censored)):
        reached, censored = queries_reached(table.results[row.label], table.target)
        if not reached:
            continue
        mean = statistics.bootstrap_interval(list(reached.values()))
        at, *ends = (100 * value / table.budget for value in (mean.estimate, mean.low, mean.high))
        told = f"{'>' if censored else ''}{mean.estimate:,.0f}"
        enough = len(reached) >= SEEDS_NEEDED[table.kind] and censored < len(reached)
        told += f" {between(mean.low, mean.high, ',.0f')}" if enough else ""
        low, high = ends if enough else (None, None)
        note = f"{censored} of {len(reached)} seeds never got there" if censored else ""
        bars.append(Bar(row.label, f"{told}, n = {len(reached)}", at, low, high, note))
    if not bars:
        return None
    about = (
        f"Queries until offline win rate {table.target:.3f} ({SHARE_OF_GAIN:.0%} of {BASELINE}'s gain) was reached and "
        "held at two marks running: mean over seeds with its 95% bootstrap interval. An arrow marks a bar in "
        "which seeds never got there and count with the budget, so that it is a lower bound. Fewer is better."
    )
    ticks = [(25.0 * i, f"{table.budget * i / 4:,.0f}") for i in range(5)]
    return Bars("target", "Queries to target", about, ticks, bars)


def difference_bars(table: Table) -> Bars | None:
    """Final offline win rate less the baseline's, paired by seed; None where no agent has the seeds for it."""
    found = [(row, row.differences["offline win rate"]) for row in table.rows if "offline win rate" in row.differences]
    if not found:
        return None
    ends = [0.0, *(end for _, one in found for end in (one.low, one.high))]
    room = 0.05 * (max(ends) - min(ends)) or 0.01
    low, high = min(ends) - room, max(ends) + room
    place: Callable[[float], float] = lambda value: 100 * (value - low) / (high - low)  # noqa: E731
    bars = []
    for row, one in sorted(found, key=lambda pair: -pair[1].estimate):
        told = f"{one.estimate:+.3f} {between(one.low, one.high, '+.3f')}, n = {one.n}"
        bars.append(Bar(row.label, told, place(one.estimate), place(one.low), place(one.high)))
    about = (
        f"Final offline win rate less that of {BASELINE}, paired by seed, with its 95% bootstrap interval. Where the "
        "interval crosses the line at 0, the two are not told apart."
    )
    return Bars("differences", f"Difference to {BASELINE}", about, [(place(0.0), "0")], bars, place(0.0))
