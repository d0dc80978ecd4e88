"""Performance profiles, win rate against KL, and over-optimisation: one panel per table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from llm_duel_env.benchmark.leaderboard import Row, Table
from llm_duel_env.benchmark.matched import value_at
from llm_duel_env.benchmark.profiles import common_grid, performance_profile, sample_efficiency
from llm_duel_env.benchmark.report.plots import INK, QUIET, dress, panels_for, styles_of
from llm_duel_env.benchmark.results import Curve, Result, belief_curve, curve, kl_curve, win_curve
from llm_duel_env.benchmark.statistics import SEEDS_NEEDED

POINTS = 101
BANDED = 10
"""Agents up to which bands are drawn: of more, nobody could tell them apart."""
PAIRS: tuple[tuple[str, Callable[[Result, str], Curve | None], str, str, str, str], ...] = (
    (
        "oracle",
        curve,
        "offline_win_rate",
        "true_win_rate",
        "offline win rate by the learned oracle",
        "offline win rate by the truth",
    ),
    (
        "belief",
        belief_curve,
        "believed",
        "labelled",
        "believed: P(deployed response beats the reference)",
        "how often the oracle says so",
    ),
)
"""Kinds of over-optimisation: its name, how a result is read, the proxy's and the target's curve, and their labels."""


def write(tables: list[Table], folder: Path) -> list[Path]:
    """Draws ``profiles.png`` and, where runs know what they need, ``win_rate_by_kl.png`` and
    ``overoptimisation_oracle.png`` / ``overoptimisation_belief.png``; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    plans: list[tuple[str, list[Table], Callable[[Axes, Table], None], float]] = [
        ("profiles.png", tables, profile_panel, 6.4),
        ("win_rate_by_kl.png", [table for table in tables if any(map(_reach, _rows(table)))], kl_panel, 6.4),
    ]
    for kind in PAIRS:
        known = [table for table in tables if any(path_of(table, row, kind) is not None for row in table.rows)]

        def draw(panel: Axes, table: Table, kind: tuple = kind) -> None:
            overoptimisation_panel(panel, table, kind)

        plans.append((f"overoptimisation_{kind[0]}.png", known, draw, 5.6))
    paths = []
    for file, drawable, panel_of, width in plans:
        if drawable:
            drawn, panels = panels_for(len(drawable), width, 4.2)
            for panel, table in zip(panels, drawable):
                panel_of(panel, table)
            paths.append(folder / file)
            drawn.savefig(paths[-1], dpi=160, facecolor="white")
    return paths


def profile_panel(panel: Axes, table: Table) -> None:
    """The share of runs that end above each win rate."""
    ends = {row.label: [win_curve(result)[1][-1] for result in _runs(table, row)] for row in table.rows}
    low, high = min(map(min, ends.values())), max(map(max, ends.values()))
    margin = max(0.02 * (high - low), 1e-3)
    levels = np.linspace(low - margin, high + margin, POINTS)
    banded = False
    for row, colour, dash in _drawn(table):
        band = performance_profile(ends[row.label], levels)
        if band.n >= SEEDS_NEEDED[table.kind] and len(table.rows) <= BANDED:
            panel.fill_between(levels, band.low, band.high, color=colour, alpha=0.13, linewidth=0, step="post")
            banded = True
        panel.plot(
            levels, band.estimate, color=colour, linestyle=dash, linewidth=1.6, label=row.label, drawstyle="steps-post"
        )
    panel.set_xlim(levels[0], levels[-1])
    panel.set_ylim(-0.02, 1.02)
    panel.set_xlabel("final offline win rate w")
    panel.set_ylabel("share of runs above w")
    _legend(panel)
    dress(panel, table, "performance profile" + ("; band: 95% bootstrap over seeds" if banded else ""))


def kl_panel(panel: Axes, table: Table) -> None:
    """Offline win rate where runs first reach each KL, as far as all seeds of an agent get."""
    banded = False
    for row, colour, dash in _drawn(table):
        runs = _runs(table, row)
        reach = _reach(runs)
        if not reach:
            continue
        levels = np.linspace(0.0, reach, POINTS)
        curves = [(levels, np.array([_at(level, run) for level in levels])) for run in runs]
        band = sample_efficiency(curves, levels, "mean")
        if band.n >= SEEDS_NEEDED[table.kind] and len(table.rows) <= BANDED:
            panel.fill_between(levels, band.low, band.high, color=colour, alpha=0.13, linewidth=0)
            banded = True
        panel.plot(levels, band.estimate, color=colour, linestyle=dash, linewidth=1.6, label=row.label)
        panel.plot(levels[-1], band.estimate[-1], "o", color=colour, markersize=3.5)
    panel.set_xlim(left=0)
    panel.set_xlabel("KL to the reference (nats)")
    panel.set_ylabel("offline win rate")
    _legend(panel)
    dress(panel, table, "mean where KL is first reached" + ("; band: 95% bootstrap over seeds" if banded else ""))


def overoptimisation_panel(panel: Axes, table: Table, kind: tuple) -> None:
    """What is maximised (across) against what is meant (up), along training; dots are the ends. `kind` is one of
    `PAIRS`."""
    corners: list[float] = []
    for row, colour, dash in _drawn(table):
        path = path_of(table, row, kind)
        if path is None:
            continue
        proxy, target = path
        panel.plot(
            proxy, target, color=colour, linestyle=dash, linewidth=1.6, marker=".", markersize=3, label=row.label
        )
        panel.plot(proxy[-1], target[-1], "o", color=colour, markersize=5)
        corners += [float(value) for values in path for value in (values.min(), values.max())]
    low, high = min(corners) - 0.02, max(corners) + 0.02
    panel.plot([low, high], [low, high], color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
    panel.fill_between([low, high], [low, high], low, color="#f2f2f2", linewidth=0, zorder=-1)
    panel.annotate(
        "over-optimised", (high, low), (-4, 4), textcoords="offset points", ha="right", fontsize=8, color=INK
    )
    panel.set_xlim(low, high)
    panel.set_ylim(low, high)
    panel.set_xlabel(kind[4])
    panel.set_ylabel(kind[5])
    _legend(panel)
    dress(panel, table, "mean over seeds along training; dots: ends")


def path_of(table: Table, row: Row, kind: tuple) -> tuple[np.ndarray, np.ndarray] | None:
    """Seed means of the proxy and of the target at common queries; None where a seed does not know them."""
    read = [[kind[1](result, name) for result in _runs(table, row)] for name in kind[2:4]]
    if any(found is None for curves in read for found in curves):
        return None
    known = [[found for found in curves if found is not None] for curves in read]
    # As many points as were measured, and no more: a path between them is not known.
    points = max(2, min(len(queries) for queries, _ in known[0]))
    grid = np.linspace(0.0, min(float(queries[-1]) for queries, _ in known[0]), points)
    grid = grid if points <= len(common_grid(table.budget)) else common_grid(table.budget)
    proxy, target = (sample_efficiency(curves, grid, "mean").estimate for curves in known)
    return proxy, target


def _reach(runs: list[Result]) -> float:
    """The KL that all runs reach; 0 where one knows none."""
    found = [kl_curve(run) for run in runs]
    return max(0.0, min((float(kl[1].max()) if kl is not None else 0.0 for kl in found), default=0.0))


def _at(level: float, run: Result) -> float:
    kl = kl_curve(run)
    assert kl is not None
    value = value_at(level, kl[1], win_curve(run)[1])
    assert value is not None
    return value


def _runs(table: Table, row: Row) -> list[Result]:
    return list(table.results[row.label].values())


def _rows(table: Table) -> list[list[Result]]:
    return [_runs(table, row) for row in table.rows]


def _drawn(table: Table) -> list[tuple[Row, str, object]]:
    """Rows with their colour and dashes, the best last, on top."""
    styles = styles_of([row.label for row in table.rows])
    return [(row, *styles[row.label]) for row in reversed(table.rows)]


def _legend(panel: Axes) -> None:
    """Beside the panel, in the table's order."""
    lines, labels = panel.get_legend_handles_labels()
    panel.legend(
        lines[::-1], labels[::-1], fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02),
        handlelength=2.2, labelspacing=0.35,
    )  # fmt: skip
