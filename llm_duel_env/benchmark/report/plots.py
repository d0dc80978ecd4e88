"""Learning curves: offline win rate, true utility and regret against oracle queries, one panel per table.

`report.figures` has profiles, win rate against KL, and over-optimisation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llm_duel_env.benchmark.leaderboard import Table
from llm_duel_env.benchmark.profiles import Statistic, common_grid, sample_efficiency
from llm_duel_env.benchmark.results import Curve, Result
from llm_duel_env.benchmark.results import curve as curve_of
from llm_duel_env.benchmark.statistics import SEEDS_NEEDED, isotonic, values_at

# Okabe and Ito's palette, told apart by colour-blind readers; dashes tell apart what lies beyond eight.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
FIXED = {"sea": 0, "online_dpo": 1, "offline_dpo": 2, "uniform": 7}
"""Agents that every comparison has keep their colour from figure to figure."""
CLAIMED = "claimed_queries"
"""The queries that an agent would report, where it is charged for more (SEA as released)."""
INK, QUIET = "#222222", "#8a8a8a"


def write(tables: list[Table], folder: Path) -> list[Path]:
    """Draws ``win_rate.png``, ``win_rate_iqm.png`` (interquartile means) and, where the tasks know them,
    ``utility.png`` and ``regret.png``; returns the paths.

    Where an agent claims another number of queries than it is charged, ``win_rate_claimed.png`` shows that axis.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "win_rate_iqm.png"]
    drawn = figure(tables, "offline_win_rate", "offline win rate, interquartile mean", statistic="iqm")
    drawn.savefig(paths[-1], dpi=160, facecolor="white")
    for name, label, file in (
        ("offline_win_rate", "offline win rate", "win_rate.png"),
        ("true_utility", "true utility of deployed responses", "utility.png"),
        ("cumulative_regret", "cumulative regret", "regret.png"),
    ):
        known = [table for table in tables if _known(table, name)]
        if known:
            paths.append(folder / file)
            figure(known, name, label).savefig(paths[-1], dpi=160, facecolor="white")
    claiming = [table for table in tables if any(CLAIMED in result["curve"] for result in _results(table))]
    if claiming:
        paths.append(folder / "win_rate_claimed.png")
        drawn = figure(claiming, "offline_win_rate", "offline win rate", axis=CLAIMED)
        drawn.savefig(paths[-1], dpi=160, facecolor="white")
    return paths


def figure(tables: list[Table], name: str, label: str, axis: str = "queries", statistic: Statistic = "mean") -> Figure:
    """One panel per table, of the curve `name` with the axis `label`, over the queries charged or `CLAIMED`."""
    drawn, panels = panels_for(len(tables), 5.6, 3.9)
    for panel, table in zip(panels, tables):
        _panel(panel, table, name, label, axis, statistic)
    return drawn


def panels_for(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of this size in inches, at most three beside one another."""
    columns = min(count, 3)
    lines = -(-count // columns)
    drawn = Figure(figsize=(width * columns, height * lines), layout="constrained")
    panels = list(drawn.subplots(lines, columns, squeeze=False).ravel())
    for panel in panels[count:]:
        panel.set_visible(False)
    return drawn, panels[:count]


def _known(table: Table, name: str) -> bool:
    return all(curve_of(result, name) is not None for result in _results(table))


def _results(table: Table) -> list[Result]:
    return [result for by_seed in table.results.values() for result in by_seed.values()]


def curve(result: Result, name: str, axis: str = "queries") -> Curve | None:
    """A run's curve `name` over `axis`; over the queries charged where the run knows no other number."""
    found, places = curve_of(result, name), result["curve"].get(axis)
    if found is None or places is None or any(place is None for place in places):
        return found
    return np.asarray(places, float), found[1]


def _panel(panel: Axes, table: Table, name: str, label: str, axis: str, statistic: Statistic) -> None:
    styles, ends, bands = styles_of([row.label for row in table.rows]), [], set()
    for row in reversed(table.rows):  # the best is drawn last, on top
        results = list(table.results[row.label].values())
        curves = [found for result in results if (found := curve(result, name, axis)) is not None]
        grid = _grid(curves, table.budget)
        middle = sample_efficiency(curves, grid, statistic)
        colour, dash = styles[row.label]
        low, high, over = _band(results, curves, grid, name, statistic)
        if low is not None and high is not None:
            panel.fill_between(grid, low, high, color=colour, alpha=0.16, linewidth=0)
            bands.add(over)
        panel.plot(grid, middle.estimate, color=colour, linestyle=dash, linewidth=1.8, solid_capstyle="round")
        ends.append((float(middle.estimate[-1]), f"{row.label}", colour))
    if name == "offline_win_rate":
        panel.axhline(0.5, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
        if table.target is not None:
            panel.axhline(table.target, color=INK, linewidth=0.8, linestyle=(0, (6, 3)), zorder=0)
            text = f"target {table.target:.3f}"
            panel.annotate(text, (0, table.target), (2, 2), textcoords="offset points", fontsize=7.5, color=INK)
    panel.set_xlim(0, table.budget)
    _label_ends(panel, table.budget, ends)
    panel.set_xlabel("oracle queries as the agent counts them" if axis == CLAIMED else "oracle queries")
    panel.set_ylabel(label)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    shown = {"mean": "mean", "iqm": "interquartile mean"}[statistic]
    dress(panel, table, f"{shown}; band: {'; '.join(sorted(bands))}" if bands else "")


def dress(panel: Axes, table: Table, told: str) -> None:
    """A panel's title, with what is `told` below it, and no more ink than it needs."""
    panel.set_title(_title(table), loc="left", fontsize=10.5, color=INK, pad=20)
    settings = json.dumps(table.env_kwargs, sort_keys=True) if table.env_kwargs else ""
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    panel.annotate(" · ".join(filter(None, [settings, told])), (0, 1), (0, 7), fontsize=7.5, color=QUIET, **place)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#e8e8e8", linewidth=0.7)
    panel.set_axisbelow(True)


def _grid(curves: list[Curve], budget: float) -> np.ndarray:
    """The common queries, up to where the first of these runs ends (a stalled one, or one that never asks)."""
    end = min(float(queries[-1]) for queries, _ in curves)
    grid = common_grid(budget)
    return np.append(grid[grid < end], end)


def _band(
    results: list[Result], curves: list[Curve], grid: np.ndarray, name: str, statistic: Statistic
) -> tuple[np.ndarray | None, np.ndarray | None, str]:
    """Low and high (G,), and what the band is."""
    if len(curves) == 1:
        low, high = curve_of(results[0], "win_low"), curve_of(results[0], "win_high")
        if name == "offline_win_rate" and low is not None and high is not None:
            ends = values_at([(curves[0][0], low[1]), (curves[0][0], high[1])], grid)
            return ends[0], ends[1], "95% bootstrap over held-out prompts (1 seed)"
        return None, None, ""
    values = values_at(curves, grid)
    if len(curves) < SEEDS_NEEDED[results[0]["kind"]]:
        return values.min(axis=0), values.max(axis=0), f"smallest to largest of {len(curves)} seeds"
    band = sample_efficiency(curves, grid, statistic)
    return band.low, band.high, f"95% bootstrap over {len(curves)} seeds"


def _label_ends(panel: Axes, x: float, ends: list[tuple[float, str, str]]) -> None:
    """Names each curve at its right end, moved apart where they would overlap."""
    low, high = panel.get_ylim()
    gap = (high - low) * 0.055
    values = np.array([value for value, _, _ in sorted(ends)])
    # Heights with at least `gap` between neighbours that are closest to the values, in least squares.
    steps = gap * np.arange(len(values))
    for (value, text, colour), y in zip(sorted(ends), isotonic(values - steps) + steps):
        panel.annotate(
            text,
            (x, value),
            (x * 1.03, y),
            color=colour,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 1},
        )


def styles_of(labels: list[str]) -> dict[str, tuple[str, Any]]:
    """A colour and dashes per label: the fixed ones first, the rest in alphabetical order."""
    styles: dict[str, tuple[str, Any]] = {
        label: (PALETTE[FIXED[label]], DASHES[0]) for label in labels if label in FIXED
    }
    free = [i for i in range(len(PALETTE)) if PALETTE[i] not in {colour for colour, _ in styles.values()}]
    for number, label in enumerate(sorted(set(labels) - set(styles))):
        wheel = free or list(range(len(PALETTE)))
        styles[label] = (PALETTE[wheel[number % len(wheel)]], DASHES[(number // len(wheel)) % len(DASHES)])
    return styles


def _title(table: Table) -> str:
    seeds = sorted({row.seeds for row in table.rows})
    count = f"{seeds[0]} seed{'s' if seeds[0] > 1 else ''}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    return f"{table.env}  ·  {count}, {table.feedback} feedback"
