"""The tables below the main one: differences from the baseline, win rate at matched KL, what reward models believe."""

from __future__ import annotations

from dataclasses import dataclass

from llm_duel_env.benchmark import statistics
from llm_duel_env.benchmark.leaderboard import BASELINE, Table
from llm_duel_env.benchmark.matched import AtLevel, Matched, matched
from llm_duel_env.benchmark.report.text import difference, name, number
from llm_duel_env.benchmark.results import COMPARED, differences_to, paired_enough, win_curve
from llm_duel_env.benchmark.statistics import Interval

PAIRED = f"Less {BASELINE}, paired by seed"
COUNTS = ("queries to target", "cumulative regret")
"""Compared figures that are written without decimals."""
BELIEF_HEADINGS = {
    "believed": "believed",
    "labelled": "oracle",
    "true": "truth",
    "spread": "spread",
    "accuracy": "accuracy",
    "calibration_error": "calibration error",
    "spread_tells_error": "spread ~ error",
    "doubt_tells_error": "doubt ~ error",
}


@dataclass(frozen=True)
class Block:
    """One table as text."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    """The first cell of each is the agent's name."""
    note: str
    """What a reader must know to read it."""


def blocks(table: Table) -> list[Block]:
    """All that can be said of a table beyond its main figures; blocks without a row are left out."""
    at_levels = matched(table)
    headings, rows = paired_cells(table)
    found = [
        Block(PAIRED, headings, rows, paired_note(table)),
        *(less(table, label) for label in table.against if label in table.results),
        _at_kl(table, at_levels),
        _less_at_kl(table, at_levels),
        _beliefs(table),
    ]
    return [block for block in found if block.rows]


def paired_cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of what each agent has more than the baseline, paired by seed; no rows where seeds are too
    few."""
    differences = {row.label: row.differences for row in table.rows if row.differences}
    above = {row.label: number(row.improvement, ".2f", row.improvement_interval) for row in table.rows}
    return _cells(table, differences, above)


def less(table: Table, label: str) -> Block:
    """What each agent has more than `label`, paired by seed; no rows where seeds are too few."""
    differences, above = {}, {}
    theirs = table.results[label]
    for other, ours in table.results.items():
        if other != label and paired_enough(ours, theirs):
            differences[other] = differences_to(ours, theirs, table.target)
            ends = [[win_curve(result)[1][-1] for result in results.values()] for results in (ours, theirs)]
            found = statistics.improvement_interval(*ends)
            above[other] = number(found.estimate, ".2f", (found.low, found.high))
    return Block(f"Less {label}, paired by seed", *_cells(table, differences, above), paired_note(table, label))


def _cells(
    table: Table, differences: dict[str, dict[str, Interval]], above: dict[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each label in `differences`, in the table's order; `above` is how often it ends above."""
    names = [name for name in COMPARED if any(name in found for found in differences.values())]
    forms = {compared: "+.0f" if compared in COUNTS else "+.3f" for compared in names}
    rows = []
    for row in table.rows:
        if row.label in differences:
            found = differences[row.label]
            cells = [difference(found.get(compared), form) for compared, form in forms.items()]
            rows.append([name(row), *cells, above[row.label]])
    return ["agent", *names, "ends above it"], rows


def paired_note(table: Table, label: str = BASELINE) -> str:
    """What a reader must know to read `paired_cells`, or `less` of `label`."""
    note = (
        "95% bootstrap interval over seeds. A difference whose interval holds 0 is not told from none. Ends above it: "
        f"the probability that a run of this agent ends with a higher win rate than one of {label}, runs not paired."
    )
    if any(row.censored for row in table.rows):
        note += " Seeds that never got to the target count with the budget."
    return note


def _at_kl(table: Table, found: Matched) -> Block:
    rows = [
        [name(row), *(_cell(found.agents[row.label].get(level)) for level in found.levels)]
        for row in table.rows
        if found.agents[row.label]
    ]
    note = (
        "Offline win rate where a run first reaches this KL to its reference (nats), between two evaluations by linear "
        "interpolation; the mean over seeds, blank where some seed never gets there. Brackets: 95% bootstrap interval "
        "over seeds. KL is the policy's; win rates are of deployed responses."
    )
    return Block("Win rate at matched KL", ["agent", *(f"KL {level:g}" for level in found.levels)], rows, note)


def _less_at_kl(table: Table, found: Matched) -> Block:
    rows = []
    for row in table.rows:
        cells = [difference(at.difference if at else None) for at in map(found.agents[row.label].get, found.levels)]
        if any(at.difference for at in found.agents[row.label].values()):
            rows.append([name(row), *cells])
    headings = ["agent", *(f"KL {level:g}" for level in found.levels)]
    note = "95% bootstrap interval over seeds, paired by seed; blank where one of the two never gets there."
    return Block(f"Less {BASELINE} at matched KL", headings, rows, note)


def _beliefs(table: Table) -> Block:
    known = [belief for belief in BELIEF_HEADINGS if any(belief in row.beliefs for row in table.rows)]
    rows = [
        [name(row), *(number(row.beliefs.get(belief), ".3f") for belief in known)] for row in table.rows if row.beliefs
    ]
    note = (
        "At the end of the run, on held-out prompts. Believed: the reward models' mean probability that the deployed "
        "response beats the reference; oracle: how often the oracle says so (truth: the task's truth, where it is "
        "another). Believed above oracle is over-optimisation. Spread: the standard deviation, over reward models, of "
        "that pair's margin. Accuracy and calibration error: on pairs of the supervised policy's responses. Spread ~ "
        "error: rank correlation, on those pairs, of the spread with how wrong the belief is; doubt ~ error: the same "
        "of the mean belief's closeness to 1/2, which needs no ensemble."
    )
    return Block("What reward models believe", ["agent", *(BELIEF_HEADINGS[belief] for belief in known)], rows, note)


def _cell(at: AtLevel | None) -> str:
    return number(at.win_rate if at else None, ".3f", at.interval if at else None)
