"""The board: what the kept results say of every agent of the board's suites, as one Markdown file.

One part per suite, or per task and budget of one that has several: a ranked table of agents that are told of duels
alone, a table of those that are told more, and those with too few seeds to be ranked. All rows of a part count to the
same target, online DPO's. No number in it is typed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from llm_duel_env.benchmark.leaderboard import RICHER, Row, Table, ranked, tables
from llm_duel_env.benchmark.registry import load_agent
from llm_duel_env.benchmark.report.table import cells, detail_lines, markdown_table, notes
from llm_duel_env.benchmark.results import Result, has_win_rate, last
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.statistics import SEEDS_NEEDED
from llm_duel_env.benchmark.stored import Kept, same_settings
from llm_duel_env.benchmark.suite import load_suite

SUITES = ("board-synthetic", "board-synthetic-32", "board-tiny-tldr")
"""The suites that the board is made of."""
CLAIMED = (
    "Claimed queries: how many of the queries that it bought an agent's released code would have counted; all are "
    "charged here. `llm-duel leaderboard --out FOLDER` draws win rates over them (`win_rate_claimed.png`)."
)
MARK = "†"
"""On agents whose kept results were played with other settings than the suite would tell them now."""


@dataclass(frozen=True)
class Part:
    """One suite's part of the board."""

    suite: str
    table: Table | None
    """All agents that have a result, in one table; None where nothing is kept yet."""
    missing: dict[str, int] = field(default_factory=dict)
    """Label -> how many of its runs have no result."""
    told: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Label -> what the agent is told beyond duels."""

    def rows(self, agent: str) -> list[Row]:
        """The rows of one agent, whatever their labels."""
        if self.table is None:
            return []
        played = {label: next(iter(seeds.values()))["agent"] for label, seeds in self.table.results.items()}
        return [row for row in self.table.rows if played[row.label] == agent]

    def sections(self) -> tuple[list[Row], list[Row], list[Row]]:
        """The rows of (duels alone, told more, too few seeds), the first with ranks, the others without."""
        if self.table is None:
            return [], [], []
        enough = SEEDS_NEEDED[self.table.kind]
        few = [row for row in self.table.rows if row.seeds < enough]
        many = [row for row in self.table.rows if row.seeds >= enough]
        duels = [row for row in many if not self.told[row.label]]
        richer = [row for row in many if self.told[row.label]]
        return ranked(duels, self.table.results), _unranked(richer), _unranked(few)


def _unranked(rows: Sequence[Row]) -> list[Row]:
    """The rows without the ranks that they have where all agents of the table are compared."""
    return [replace(row, rank=None, place=None, tied=()) for row in rows]


def parts_of(suite: str, kept: Kept) -> list[Part]:
    """A suite's parts: one for each environment with its settings, and each budget, that it plays."""
    worlds: dict[str, list[RunConfig]] = {}
    for run in load_suite(suite, "runs"):
        same = (run.env, run.env_kwargs, run.budget, run.batch, run.eval_prompts)
        worlds.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    return [part(suite, kept, runs) for runs in worlds.values()]


def part(suite: str, kept: Kept, runs: Sequence[RunConfig] | None = None) -> Part:
    """One suite's part, of the results that are kept; `runs` stands for the suite's own."""
    runs = load_suite(suite, "runs") if runs is None else runs
    found: list[Result] = []
    missing: dict[str, int] = {}
    for label in dict.fromkeys(run.label for run in runs):
        of_label = [run for run in runs if run.label == label]
        results = [result for run in of_label if (result := kept.result(run))]
        if not results:  # better than nothing, and marked
            others = [result for run in of_label if (result := kept.result(run, any_settings=True))]
            results = [result for result in others if result["overrides"] == others[0]["overrides"]]
        alike = all(same_settings(result, of_label[0]) for result in results)
        name = label if alike else label + MARK
        found += [{**result, "label": name} for result in results if has_win_rate(result)]
        if len(results) < len(of_label):
            missing[label] = len(of_label) - len(results)
    # What the agent says of itself today; a result has what it said when it was played.
    provenance = {agent: load_agent(agent).provenance for agent in {result["agent"] for result in found}}
    found = [{**result, "provenance": provenance[result["agent"]]} for result in found]
    told = {result["label"]: tuple(sorted(set(result["needs"]) & RICHER)) for result in found}
    # One table for all, so that all count to one target; who is told what is looked at afterwards.
    made = tables([{**result, "needs": []} for result in found])
    if len(made) > 1:
        raise ValueError(f"suite {suite} plays {len(made)} different settings of environments: expected one")
    return Part(suite, made[0] if made else None, missing, told)


def board(parts: Sequence[Part], command: str, extra: str = "") -> str:
    """The board as Markdown; `command` made it, and `extra` is what people wrote about it."""
    text = [
        "# Benchmark",
        "",
        f"Made by `{command}` from the results in `benchmark/results`, one small JSON per run; nothing here is typed. "
        "`make board-runs` plays what is missing (hours) and keeps each result there, so that the board may be filled "
        "in several sittings; `make tune-board` plays the sweeps behind the recipes.",
        "",
        "`*` marks agents that were rebuilt from notes or code, not from their paper's text: they are not ranked as "
        f"the paper's method. `{MARK}` marks results that were played with other settings than today's recipe; they "
        "are to be played again.",
        "",
    ]
    for one in parts:
        text += [f"## {one.table.title if one.table else one.suite}", "", *_part(one)]
    return "\n".join([*text, *([extra.strip(), ""] if extra.strip() else [])])


def write(kept: Kept, path: Path, command: str, suites: Sequence[str] = SUITES, extra: str = "") -> list[Part]:
    """Writes the board of `suites`; returns its parts."""
    parts = [part for suite in suites for part in parts_of(suite, kept)]
    path.write_text(board(parts, command, extra))
    return parts


def _part(one: Part) -> list[str]:
    lines = [f"Suite `{one.suite}`.", ""]
    table = one.table
    if table is not None:
        duels, richer, few = one.sections()
        needed = SEEDS_NEEDED[table.kind]
        for title, rows, ranks in (
            (f"Told of duels alone, {needed} seeds or more", duels, "Ranks by final offline win rate."),
            ("Told more than duels", richer, "Not ranked: they are told more than labels, or by one who knows."),
            (f"Fewer than {needed} seeds", few, "Not ranked."),
        ):
            if rows:
                lines += [f"### {title}", "", ranks, "", *_lines(one, replace(table, rows=rows)), ""]
        told = notes(replace(table, rows=[*duels, *richer, *few]))
        if any(claimed_queries(table, row) is not None for row in table.rows):
            told.append(CLAIMED)
        lines += [*(f"{note}  " for note in told if not note.startswith("Fewer than")), ""]
    if one.missing:
        runs = ", ".join(f"`{label}` ({count})" for label, count in one.missing.items())
        lines += [f"Not measured yet (runs): {runs}.", ""]
    return lines


def _lines(one: Part, table: Table) -> list[str]:
    """The table, with what its agents are told and the tokens that they generated."""
    headings, rows = cells(table)
    extra: list[tuple[str, list[str]]] = []
    tokens = [generated_tokens(table, row) for row in table.rows]
    if any(value is not None for value in tokens):
        extra.append(("generated tokens", ["–" if value is None else f"{value:.0f}" for value in tokens]))
    claimed = [claimed_queries(table, row) for row in table.rows]
    if any(value is not None for value in claimed):
        extra.append(("claimed queries", ["–" if value is None else f"{value:.0f}" for value in claimed]))
    if any(one.told[row.label] for row in table.rows):
        extra.append(("told beyond duels", [", ".join(one.told[row.label]) or "–" for row in table.rows]))
    headings = [*headings, *(name for name, _ in extra)]
    lines = markdown_table(headings, [[*row, *(values[i] for _, values in extra)] for i, row in enumerate(rows)])
    return [*lines, *detail_lines(table)]


def claimed_queries(table: Table, row: Row) -> float | None:
    """Queries that the agent's release would have counted, the mean over seeds; None for agents that count as we do."""
    known = [count for result in table.results[row.label].values() if (count := last(result, "claimed_queries"))]
    return float(np.mean(known)) if known else None


def generated_tokens(table: Table, row: Row) -> float | None:
    """Tokens that the policy generated for duels, the mean over seeds; None on finite tasks."""
    counts = [result.get("generated_tokens") for result in table.results[row.label].values()]
    known = [count for count in counts if count is not None]
    return float(np.mean(known)) if known else None
