"""Leaderboard tables for a terminal, and as Markdown, CSV and JSON. Every number comes from `Table`; none is typed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from llm_duel_env.benchmark.leaderboard import BASELINE, Row, Table
from llm_duel_env.benchmark.matched import matched
from llm_duel_env.benchmark.report import text
from llm_duel_env.benchmark.report.details import PAIRED, blocks, paired_cells, paired_note
from llm_duel_env.benchmark.report.records import csv_text, curves_csv
from llm_duel_env.benchmark.results import SELF_REPORTED
from llm_duel_env.benchmark.run_folder import finite, rounded, write_json
from llm_duel_env.benchmark.statistics import SEEDS_NEEDED, SHARE_OF_GAIN

__all__ = ["PAIRED", "cells", "csv_text", "markdown", "notes", "paired_cells", "paired_note", "show", "write"]
HEADINGS = (
    "agent",
    "offline win rate",
    "less online DPO",
    "length-controlled",
    "true win rate",
    "curve mean",
    "online win rate",
    "queries to target",
    "÷ online DPO",
    "cumulative regret",
    "simple regret",
    "utility",
    "KL (nats)",
    "tokens",
    "gradient steps",
    "evaluations",
    "seconds",
    "seeds",
    "rank",
    "checked",
)


def cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, all text; columns that no row fills are left out, and so is "checked" where
    no entry was replayed, which `notes` says."""
    rows = [_cells(row) for row in table.rows]
    filled = [i for i in range(len(HEADINGS)) if any(row[i] not in ("–", SELF_REPORTED) for row in rows)]
    return [HEADINGS[i] for i in filled], [[row[i] for i in filled] for row in rows]


def notes(table: Table) -> list[str]:
    """What a reader must know to read the table."""
    told = [
        f"Budget {table.budget} oracle queries, {table.batch} prompts per round, {table.feedback} feedback. Sorted by "
        f"final offline win rate, on {table.eval_prompts} held-out prompts."
    ]
    if any(row.kl is not None or row.length is not None for row in table.rows) and table.kind == "text":
        told.append(
            "Offline win rate and utility are of the deployed responses (greedy, unless the agent says otherwise); KL "
            "and tokens are of samples of the policy at temperature 1."
        )
    if table.target is not None:
        share = f"{SHARE_OF_GAIN:.0%} of {BASELINE}'s gain"
        told.append(
            f"Target: offline win rate {table.target:.3f} ({share}, seed-mean isotonic curve), held at two "
            "marks running of the grid that all curves are read off at. '>' marks a mean in which a seed never got "
            "there and counts with the budget; a ratio marked '<' has such a seed below the line, one marked '?' on "
            "both sides."
        )
    over = {row.interval_over for row in table.rows}
    if "seeds" in over:
        told.append("Brackets: 95% bootstrap interval over seeds; differences and ratios are paired by seed.")
    if "prompts" in over:
        told.append("Brackets where there is one seed: 95% bootstrap interval over held-out prompts, not over seeds.")
    if table.few_seeds:
        needed, few = SEEDS_NEEDED[table.kind], ", ".join(table.few_seeds)
        told.append(f"Fewer than {needed} seeds, and so no interval over seeds and no rank: {few}.")
    if any(row.place is not None for row in table.rows):
        told.append(
            "Rank: 1 + the number of ranked agents that end above this one and are told from it; '=': there are others "
            "that it is not told from (the interval of the difference in final win rate, paired by seed, includes 0). "
            "Brackets after it: 95% bootstrap interval of the rank by mean."
        )
    if any(row.length_controlled is not None for row in table.rows):
        told.append("Length-controlled: the final win rate had the responses been as long as the reference.")
    if any(row.true_win_rate is not None for row in table.rows):
        told.append("True win rate: the final win rate as the task's truth has it; labels come from a learned proxy.")
    if any(row.provenance == "reconstructed" for row in table.rows):
        told.append("Agents marked * are rebuilt from notes or code, not from their paper's text, and not ranked.")
    if any(row.stalled for row in table.rows):
        names = "; ".join(
            f"{row.label} ({row.stalled} of {row.seeds} seeds; {row.queries:.0f} queries bought, the mean of all seeds)"
            for row in table.rows
            if row.stalled
        )
        told.append(f"Runs that ended without spending their budget (stalled), scored as they were: {names}.")
    if any(row.queries == 0 for row in table.rows):
        told.append("Where no query was bought there is no regret, and no KL to match.")
    if all(row.checked == SELF_REPORTED for row in table.rows):
        told.append("All entries are self-reported: none was played again here (`llm-duel leaderboard --rerun`).")
    else:
        told.append(
            "Checked: so many first rounds, or evaluations, of so many seeds were played again here from seed and "
            "settings, and compared with what the entry holds; self-reported entries were not."
        )
    return told


def show(table: Table, console: Console) -> None:
    """Prints one table in the terminal."""
    _print(console, table.title, *cells(table), "\n".join(notes(table)))
    for block in blocks(table):
        _print(console, block.title, block.headings, block.rows, block.note)


def _print(console: Console, title: str, headings: list[str], rows: list[list[str]], note: str) -> None:
    shown = RichTable(title=title, title_justify="left", caption=note, caption_justify="left")
    for column, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if column else "left", no_wrap=not column)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def markdown(tables: list[Table]) -> str:
    """All tables as Markdown."""
    parts = []
    for table in tables:
        headings, rows = cells(table)
        lines = [f"### {table.title}", "", *markdown_table(headings, rows), "", *(f"{note}  " for note in notes(table))]
        parts.append("\n".join([*lines, *detail_lines(table)]))
    return "\n\n".join(parts) + "\n"


def detail_lines(table: Table) -> list[str]:
    """The lines of all `blocks` as Markdown."""
    lines: list[str] = []
    for block in blocks(table):
        lines += ["", f"{block.title}:", "", *markdown_table(block.headings, block.rows), "", block.note]
    return lines


def markdown_table(headings: list[str], rows: list[list[str]], *, numbers: bool = True) -> list[str]:
    """The lines of a Markdown table; all columns but the first are aligned to the right where they hold `numbers`."""
    rest = "--:" if numbers else ":--"
    return [_line(headings), _line([":--"] + [rest] * (len(headings) - 1)), *map(_line, rows)]


def write(tables: list[Table], folder: Path) -> list[Path]:
    """Writes ``leaderboard.md``, ``.csv``, ``.json`` and ``curves.csv`` into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("leaderboard.md", "leaderboard.csv", "leaderboard.json", "curves.csv")]
    paths[0].write_text(markdown(tables))
    paths[1].write_text(csv_text(tables))
    paths[3].write_text(curves_csv(tables))
    names = (
        *("env", "env_kwargs", "kind", "budget", "feedback", "batch"),
        *("eval_prompts", "eval_every", "fingerprint", "asks", "target"),
    )
    content = [
        {name: getattr(table, name) for name in names}
        | {"rows": [finite(rounded(dataclasses.asdict(row))) for row in table.rows], "notes": notes(table)}
        | {"matched_kl": rounded(dataclasses.asdict(matched(table)))}
        for table in tables
    ]
    write_json(paths[2], content)
    return paths


def _cells(row: Row) -> list[str]:
    bound = ">" if row.censored else ""
    return [
        text.name(row),
        text.number(row.win_rate, ".3f", row.win_interval),
        text.difference(row.differences.get("offline win rate")),
        text.number(row.length_controlled, ".3f"),
        text.number(row.true_win_rate, ".3f"),
        f"{row.area:.3f}",
        text.number(row.online_win_rate, ".3f"),
        bound + text.number(row.queries_to_target, ".0f") if row.queries_to_target is not None else "–",
        _ratio(row),
        text.number(row.cumulative_regret, ".1f"),
        text.number(row.simple_regret, ".3f"),
        text.number(row.utility, ".3f"),
        text.number(row.kl, ".2f"),
        text.number(row.length, ".1f"),
        text.number(row.gradient_steps, ".0f"),
        text.number(row.evaluations, ".0f"),
        text.number(row.seconds, ".1f"),
        str(row.seeds),
        text.rank(row),
        row.checked,
    ]


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return "–"
    interval = f" [{row.ratio.low:.2f}, {row.ratio.high:.2f}]" if row.ratio.has_ends else ""
    return f"{row.ratio_bound}{row.ratio.estimate:.2f}{interval}"


def _line(row: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
