"""The report's table: columns as data, each with a figure, its interval over seeds, and what it is sorted by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llm_duel_env.benchmark import statistics
from llm_duel_env.benchmark.leaderboard import BASELINE, Row, Table
from llm_duel_env.benchmark.report import text
from llm_duel_env.benchmark.results import Result, last, queries_reached, regret, win_curve
from llm_duel_env.benchmark.statistics import SEEDS_NEEDED, Interval


@dataclass(frozen=True)
class Cell:
    """What stands in one place of the table."""

    text: str = text.NONE
    interval: str = ""
    """Its 95% bootstrap interval over seeds, where there are enough of them."""
    order: float | None = None
    """What its column is sorted by; None comes last whichever way."""


MakeCell = Callable[[Table, Row], Cell]


@dataclass(frozen=True)
class Column:
    """A column: its heading, what it means, and how a cell is made."""

    heading: str
    about: str
    cell: MakeCell
    best: str = "descending"
    """The order that puts the best at the top: ascending or descending."""


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    label: str
    name: str
    """The label as it is shown."""
    seeds: int
    marks: list[str]
    """What a reader must know of the entry, in a word or two each."""
    cells: list[Cell]


def lines(table: Table) -> tuple[list[Column], list[Line]]:
    """The columns that some row fills, and the rows."""
    made = [[column.cell(table, row) for column in COLUMNS] for row in table.rows]
    filled = [i for i in range(len(COLUMNS)) if any(cells[i].order is not None for cells in made)]
    return [COLUMNS[i] for i in filled], [
        Line(row.label, text.name(row), row.seeds, marks(row), [cells[i] for i in filled])
        for row, cells in zip(table.rows, made)
    ]


def marks(row: Row) -> list[str]:
    """What a reader must know of an entry before its figures."""
    found = [row.provenance] if row.provenance != "paper" else []
    found.append(row.checked)
    return found + ([f"{row.stalled} stalled"] if row.stalled else [])


def between(low: float, high: float, form: str) -> str:
    """An interval as text.

    >>> between(0.5, 0.75, ".2f")
    '[0.50, 0.75]'
    """
    return f"[{low:{form}}, {high:{form}}]"


def mean_cell(values: Sequence[float | None], form: str, kind: str) -> Cell:
    """The mean over seeds with its interval; empty where a seed does not know the value."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return Cell()
    mean = statistics.bootstrap_interval(known)
    told = between(mean.low, mean.high, form) if len(known) >= SEEDS_NEEDED[kind] else ""
    return Cell(f"{mean.estimate:{form}}", told, mean.estimate)


def _over_seeds(value: Callable[[Result], float | None], form: str) -> MakeCell:
    def cell(table: Table, row: Row) -> Cell:
        return mean_cell([value(result) for result in table.results[row.label].values()], form, table.kind)

    return cell


def _at_top(name: str, form: str) -> MakeCell:
    """Of a field of the result."""
    return _over_seeds(lambda result: result.get(name), form)


def _at_end(name: str, form: str) -> MakeCell:
    """Of the last evaluation."""
    return _over_seeds(lambda result: last(result, name), form)


def _win_rate(table: Table, row: Row) -> Cell:
    told = between(*row.win_interval, ".3f") if row.win_interval else ""
    return Cell(f"{row.win_rate:.3f}", told + (" over prompts" if row.interval_over == "prompts" else ""), row.win_rate)


def _rank(table: Table, row: Row) -> Cell:
    if row.place is None:
        return Cell()
    told = "" if row.rank is None else between(row.rank.low, row.rank.high, ".3g")
    return Cell(f"{row.place}{'=' if row.tied else ''}", told, row.place if row.rank is None else row.rank.estimate)


def _difference(table: Table, row: Row) -> Cell:
    found = row.differences.get("offline win rate")
    return Cell() if found is None else _interval(found, "+.3f")


def _interval(found: Interval, form: str, bound: str = "") -> Cell:
    return Cell(f"{bound}{found.estimate:{form}}", between(found.low, found.high, form), found.estimate)


def _to_target(table: Table, row: Row) -> Cell:
    if row.queries_to_target is None:
        return Cell()
    found = mean_cell(list(queries_reached(table.results[row.label], table.target)[0].values()), ",.0f", table.kind)
    never = row.censored == row.seeds  # all are the budget: no interval says anything
    return Cell((">" if row.censored else "") + found.text, "" if never else found.interval, found.order)


def _ratio(table: Table, row: Row) -> Cell:
    if row.ratio is None:
        return Cell()
    told = _interval(row.ratio, ".2f", row.ratio_bound)
    return told if row.ratio.has_ends else Cell(told.text, "", told.order)


COLUMNS = (
    Column(
        "rank",
        "1 + the ranked agents that end above this one and are told from it; '=': there are others that it is not told "
        "from. Below: the 95% interval of the rank by mean. Methods rebuilt from notes or code are not ranked.",
        _rank,
        "ascending",
    ),
    Column(
        "offline win rate",
        "Share of held-out prompts on which the oracle prefers the deployed response to the stored reference response, "
        "at the end of the budget. A tie counts one half.",
        _win_rate,
    ),
    Column(
        f"less {BASELINE}",
        f"Final offline win rate less that of {BASELINE}, paired by seed. Where the interval holds 0, the two are not "
        "told apart.",
        _difference,
    ),
    Column(
        "length-controlled",
        "The final offline win rate had the responses been as long as the reference.",
        _at_top("length_controlled_win_rate", ".3f"),
    ),
    Column(
        "true win rate",
        "The final offline win rate as the task's truth has it, where labels come from a learned proxy.",
        _at_end("true_win_rate", ".3f"),
    ),
    Column(
        "curve mean",
        "Mean height of the learning curve over the whole budget.",
        _over_seeds(lambda result: statistics.area_under(*win_curve(result)), ".3f"),
    ),
    Column(
        "online win rate",
        "Win rate of the two responses that were shown in duels, over the whole run.",
        _at_top("online_win_rate", ".3f"),
    ),
    Column(
        "queries to target",
        "Oracle queries until the target was reached and held at two marks running. '>': a seed never got there "
        "and counts with the budget.",
        _to_target,
        "ascending",
    ),
    Column(
        f"÷ {BASELINE}",
        f"Queries to target over those of {BASELINE}, paired by seed. '>' at least, '<' at most, '?' either: a seed "
        "above or below the line never got there.",
        _ratio,
        "ascending",
    ),
    Column(
        "cumulative regret",
        "What the duels shown lost against the best response, summed over the run.",
        _over_seeds(regret, ",.1f"),
        "ascending",
    ),
    Column(
        "simple regret",
        "The best response's utility less that of the deployed responses, at the end.",
        _at_end("simple_regret", ".3f"),
        "ascending",
    ),
    Column("utility", "True utility of the deployed responses, in logits.", _at_end("true_utility", ".3f")),
    Column(
        "KL",
        "Kullback-Leibler divergence of the final policy from its reference, in nats.",
        _at_end("kl", ".2f"),
        "ascending",
    ),
    Column("tokens", "Mean length of a sampled response.", _at_end("length", ".1f"), "ascending"),
    Column("gradient steps", "Optimizer steps of the policy.", _at_top("gradient_steps", ",.0f"), "ascending"),
    Column(
        "evaluations",
        "Oracle evaluations beyond labels that the agent was told.",
        _over_seeds(lambda result: result.get("evaluations") or None, ",.0f"),
        "ascending",
    ),
    Column(
        "seconds",
        "Wall-clock seconds of a run, on whatever it ran on and beside.",
        _at_top("seconds", ",.1f"),
        "ascending",
    ),
)
"""The columns of figures. Another one is an entry more."""
