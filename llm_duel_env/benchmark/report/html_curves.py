"""Which charts a table has: learning curves, regret, profiles, win rate at matched KL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llm_duel_env.benchmark.leaderboard import Table
from llm_duel_env.benchmark.matched import value_at
from llm_duel_env.benchmark.profiles import common_grid, performance_profile, sample_efficiency
from llm_duel_env.benchmark.report.figures import PAIRS, path_of
from llm_duel_env.benchmark.report.html_charts import POINTS, Chart, Series, line_chart, padded, span_of
from llm_duel_env.benchmark.results import Curve, Result, curve, kl_curve, win_curve
from llm_duel_env.benchmark.statistics import SEEDS_NEEDED, values_at


def learning_curves(table: Table) -> Chart | None:
    """Offline win rate over queries."""
    series, about = by_agent(table, "offline_win_rate")
    guides = [(0.5, "the reference")]
    if table.target is not None:
        guides.append((table.target, f"target {table.target:.3f}"))
    return line_chart(
        series, name="wins", title="Learning curves", about=about, x_label="oracle queries",
        y_label="offline win rate", x_range=(0, table.budget), guides=guides,
    )  # fmt: skip


def regret_curves(table: Table) -> Chart | None:
    """Cumulative regret over queries, None where the task does not know it. Few agents far above the rest are cut off,
    and named."""
    if not all(curve(result, "cumulative_regret") for seeds in table.results.values() for result in seeds.values()):
        return None
    series, about = by_agent(table, "cumulative_regret")
    ends = np.array([one.y[-1] for one in series])
    top, usual = float(ends.max()), 1.25 * float(np.quantile(ends, 0.85))
    beyond = [f"{one.label} ({end:,.0f})" for one, end in zip(series, ends) if end > usual]
    if top > 1.6 * usual > 0:
        about += f" Cut off at the top, with where they end: {', '.join(beyond)}."
        top = usual
    tallest = max([top, *(float(one.high.max()) for one in series if one.high is not None and one.high[-1] <= usual)])
    return line_chart(
        series, name="regret", title="Cumulative regret", about=about + " Lower is better.", x_label="oracle queries",
        y_label="cumulative regret", x_range=(0, table.budget), y_range=(0, 1.04 * (tallest or 1.0)),
    )  # fmt: skip


def performance_profiles(table: Table) -> Chart | None:
    """The share of an agent's seeds that end above each win rate, of the agents with seeds enough; None without any."""
    enough = [row.label for row in table.rows if row.label not in table.few_seeds]
    if not enough:
        return None
    ends = {label: [win_curve(run)[1][-1] for run in table.results[label].values()] for label in enough}
    # Agents far below all others would press these to the edge.
    low, high = padded(
        float(np.quantile([min(values) for values in ends.values()], 0.15)), max(map(max, ends.values()))
    )
    below = [label for label, values in ends.items() if max(values) <= low]
    series = []
    for label, values in ends.items():
        band = performance_profile(values, np.linspace(low, high, 2 * POINTS))
        series.append(Series(label, band.at, band.estimate, band.low, band.high))
    about = (
        f"Share of an agent's seeds ({_seeds(table)}) that end above the win rate on the axis. Band: 95% bootstrap "
        "interval over seeds. A line further to the right is better; a steep one says that seeds agree."
    )
    return line_chart(
        series,
        name="profiles",
        title="Performance profiles",
        about=about + (f" All seeds of these end below the axis: {', '.join(below)}." if below else ""),
        x_label="final offline win rate",
        y_label="share of seeds above it",
        x_range=(low, high),
        y_range=(-0.02, 1.02),
        named=False,
    )


def kl_curves(table: Table) -> Chart | None:
    """Offline win rate where runs first reach each KL, as far as all seeds of an agent get; None where KL is not
    known."""
    series = []
    for row in table.rows:
        runs = list(table.results[row.label].values())
        found = [kl_curve(run) for run in runs]
        reach = min((float(kl[1].max()) if kl is not None else 0.0 for kl in found), default=0.0)
        if reach <= 0:
            continue
        levels = np.linspace(0.0, reach, POINTS)
        read = [[value_at(level, kl[1], win_curve(run)[1]) for level in levels] for kl, run in zip(found, runs) if kl]
        curves = [(levels, np.array(values, float)) for values in read]
        band = sample_efficiency(curves, levels, "mean")
        enough = band.n >= SEEDS_NEEDED[table.kind]
        series.append(
            Series(row.label, levels, band.estimate, band.low if enough else None, band.high if enough else None)
        )
    if not series:
        return None
    return line_chart(
        series,
        name="kl",
        title="Win rate at matched KL",
        about="Offline win rate where a run first reaches each KL to its reference: mean over seeds "
        f"({_seeds(table)}), as far as all of an agent's seeds get. Band: 95% bootstrap interval over seeds. Higher at "
        "the same KL is better.",
        x_label="KL to the reference (nats)",
        y_label="offline win rate",
        x_range=(0.0, max(float(one.x[-1]) for one in series)),
        named=False,
    )


def overoptimisation(kind: tuple[Any, ...]) -> Callable[[Table], Chart | None]:
    """Makes charts of what is maximised against what is meant, along training; None where no agent's runs know both."""
    name, _, _, _, proxy_label, target_label = kind

    def chart(table: Table) -> Chart | None:
        paths = {row.label: path for row in table.rows if (path := path_of(table, row, kind)) is not None}
        if not paths:
            return None
        ends = padded(*span_of([values for path in paths.values() for values in path]))
        return line_chart(
            [Series(label, *path) for label, path in paths.items()],
            name=f"over-{name}",
            title="Over-optimisation",
            about=f"Along training, from the first marker to the last: mean over seeds ({_seeds(table)}). Below the "
            "diagonal the proxy promises more than it keeps.",
            x_label=proxy_label,
            y_label=target_label,
            x_range=ends,
            y_range=ends,
            named=False,
            diagonal=True,
        )

    return chart


CHARTS: tuple[Callable[[Table], Chart | None], ...] = (
    learning_curves,
    regret_curves,
    performance_profiles,
    kl_curves,
    *map(overoptimisation, PAIRS),
)
"""The charts of a table, in order. Another one is a function more."""


def charts(table: Table) -> list[Chart]:
    """All that the table's results have the figures for."""
    return [chart for make in CHARTS if (chart := make(table)) is not None]


def by_agent(table: Table, name: str) -> tuple[list[Series], str]:
    """The mean curve `name` of each agent, in the table's order, and what its band is."""
    series, bands = [], set()
    for row in table.rows:
        results = list(table.results[row.label].values())
        curves = [found for result in results if (found := curve(result, name)) is not None]
        # Where the first of the runs ends: one that stalled, or never asked.
        end = min(float(queries[-1]) for queries, _ in curves)
        grid = common_grid(table.budget)
        grid = np.append(grid[grid < end], end)
        low, high, over = band(results, curves, grid, name)
        bands.add(over)
        series.append(Series(row.label, grid, values_at(curves, grid).mean(axis=0), low, high))
    told = "; ".join(sorted(bands - {""})) or "none"
    return series, f"Mean over seeds ({_seeds(table)}). Band: {told}."


def band(
    results: Sequence[Result], curves: Sequence[Curve], grid: np.ndarray, name: str
) -> tuple[np.ndarray | None, np.ndarray | None, str]:
    """Low and high (G,) of one agent's curves, and what they are."""
    if len(curves) == 1:
        low, high = curve(results[0], "win_low"), curve(results[0], "win_high")
        if name == "offline_win_rate" and low is not None and high is not None:
            ends = values_at([low, high], grid)
            return ends[0], ends[1], "95% bootstrap interval over held-out prompts where there is one seed"
        return None, None, ""
    if len(curves) < SEEDS_NEEDED[results[0]["kind"]]:
        values = values_at(curves, grid)
        return values.min(axis=0), values.max(axis=0), "smallest to largest seed where there are few"
    found = sample_efficiency(curves, grid, "mean")
    return found.low, found.high, "95% bootstrap interval over seeds"


def _seeds(table: Table) -> str:
    counts = sorted({row.seeds for row in table.rows})
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
