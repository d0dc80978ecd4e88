"""Leaderboard tables for a terminal, and as Markdown, CSV and JSON. Every number comes from `Table`; none is typed."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from llm_duel_env.benchmark.leaderboard import BASELINE, Row, Table
from llm_duel_env.benchmark.results import COMPARED, SELF_REPORTED
from llm_duel_env.benchmark.run_folder import rounded, write_json
from llm_duel_env.benchmark.statistics import SEEDS_NEEDED, SHARE_OF_GAIN, Interval

HEADINGS = (
    "agent",
    "offline win rate",
    "less online DPO",
    "curve mean",
    "online win rate",
    "queries to target",
    "÷ online DPO",
    "cumulative regret",
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


def paired_cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """The same for what each agent has more than the baseline, paired by seed; no rows where seeds are too few."""
    rows = [row for row in table.rows if row.differences]
    names = [name for name in COMPARED if any(name in row.differences for row in rows)]
    return ["agent", *names], [
        [_name(row), *(_difference(row.differences.get(name), name) for name in names)] for row in rows
    ]


def paired_note(table: Table) -> str:
    """What a reader must know to read `paired_cells`."""
    note = "95% bootstrap interval over seeds. A difference whose interval holds 0 is not told from none."
    if any(row.censored for row in table.rows):
        note += " Seeds that never got to the target count with the budget."
    return note


PAIRED = f"Less {BASELINE}, paired by seed"


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
            f"Target: offline win rate {table.target:.3f} ({share}, seed-mean isotonic curve), held at two evaluations "
            "running. '>' marks a mean in which a seed never got there and counts with the budget; a ratio marked '<' "
            "has such a seed below the line, one marked '?' on both sides."
        )
    over = {row.interval_over for row in table.rows}
    if "seeds" in over:
        told.append("Brackets: 95% bootstrap interval over seeds; differences and ratios are paired by seed.")
    if "prompts" in over:
        told.append("Brackets where there is one seed: 95% bootstrap interval over held-out prompts, not over seeds.")
    if not table.enough_seeds:
        needed = SEEDS_NEEDED[table.kind]
        told.append(f"Fewer than {needed} seeds for some agent: no interval over its seeds, and no ranks.")
    if any(row.provenance == "reconstructed" for row in table.rows):
        told.append("Agents marked * are rebuilt from notes, their paper's text not at hand, and not ranked.")
    if any(row.stalled for row in table.rows):
        names = ", ".join(row.label for row in table.rows if row.stalled)
        told.append(f"Runs that ended without spending their budget (stalled), scored as they were: {names}.")
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
    headings, rows = cells(table)
    shown = RichTable(title=table.title, title_justify="left", caption="\n".join(notes(table)), caption_justify="left")
    for number, heading in enumerate(headings):
        shown.add_column(heading, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    headings, rows = paired_cells(table)
    if rows:
        paired = RichTable(title=PAIRED, title_justify="left", caption=paired_note(table), caption_justify="left")
        for number, heading in enumerate(headings):
            paired.add_column(heading, justify="left" if number == 0 else "right", no_wrap=number == 0)
        for row in rows:
            paired.add_row(*row)
        console.print(paired)


def markdown(tables: list[Table]) -> str:
    """All tables as Markdown."""
    parts = []
    for table in tables:
        headings, rows = cells(table)
        lines = [f"### {table.title}", "", *markdown_table(headings, rows), "", *(f"{note}  " for note in notes(table))]
        parts.append("\n".join([*lines, *paired_lines(table)]))
    return "\n\n".join(parts) + "\n"


def paired_lines(table: Table) -> list[str]:
    """The lines of `paired_cells` as Markdown; none where it has no rows."""
    headings, rows = paired_cells(table)
    return ["", f"{PAIRED}:", "", *markdown_table(headings, rows), "", paired_note(table)] if rows else []


def markdown_table(headings: list[str], rows: list[list[str]], *, numbers: bool = True) -> list[str]:
    """The lines of a Markdown table; all columns but the first are aligned to the right where they hold `numbers`."""
    rest = "--:" if numbers else ":--"
    return [_line(headings), _line([":--"] + [rest] * (len(headings) - 1)), *map(_line, rows)]


def csv_text(tables: list[Table]) -> str:
    """All rows as CSV, one line per agent and environment, at full width."""
    records = [record for table in tables for record in _records(table)]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def write(tables: list[Table], folder: Path) -> list[Path]:
    """Writes ``leaderboard.md``, ``.csv`` and ``.json`` into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"leaderboard.{ending}" for ending in ("md", "csv", "json")]
    paths[0].write_text(markdown(tables))
    paths[1].write_text(csv_text(tables))
    names = ("env", "env_kwargs", "kind", "budget", "feedback", "batch", "eval_prompts", "asks", "target")
    content = [
        {name: getattr(table, name) for name in names}
        | {"rows": [rounded(dataclasses.asdict(row)) for row in table.rows], "notes": notes(table)}
        for table in tables
    ]
    write_json(paths[2], content)
    return paths


def _cells(row: Row) -> list[str]:
    bound = ">" if row.censored else ""
    interval = f" [{row.win_interval[0]:.3f}, {row.win_interval[1]:.3f}]" if row.win_interval else ""
    return [
        _name(row),
        f"{row.win_rate:.3f}{interval}",
        _difference(row.differences.get("offline win rate")),
        f"{row.area:.3f}",
        _number(row.online_win_rate, ".3f"),
        bound + _number(row.queries_to_target, ".0f") if row.queries_to_target is not None else "–",
        _ratio(row),
        _number(row.cumulative_regret, ".1f"),
        _number(row.utility, ".3f"),
        _number(row.kl, ".2f"),
        _number(row.length, ".1f"),
        _number(row.gradient_steps, ".0f"),
        _number(row.evaluations, ".0f"),
        _number(row.seconds, ".1f"),
        str(row.seeds),
        _rank(row.rank),
        row.checked,
    ]


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return "–"
    interval = f" [{row.ratio.low:.2f}, {row.ratio.high:.2f}]" if row.interval_over == "seeds" else ""
    return f"{row.ratio_bound}{row.ratio.estimate:.2f}{interval}"


def _name(row: Row) -> str:
    return row.label + ("*" if row.provenance == "reconstructed" else "")


def _difference(difference: Interval | None, name: str = "") -> str:
    if difference is None:
        return "–"
    form = "+.0f" if name in ("queries to target", "cumulative regret") else "+.3f"
    return f"{difference.estimate:{form}} [{difference.low:{form}}, {difference.high:{form}}]"


def _rank(rank: Interval | None) -> str:
    return "–" if rank is None else f"{rank.estimate:g} [{rank.low:g}, {rank.high:g}]"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _line(row: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _records(table: Table) -> list[dict[str, Any]]:
    records = []
    for row in table.rows:
        record: dict[str, Any] = {"env": table.env, "budget": table.budget, "feedback": table.feedback}
        record["target"] = table.target
        for name, value in dataclasses.asdict(row).items():
            if name in ("ratio", "rank"):
                record |= _ends(name, value)
            elif name == "differences":
                for compared in COMPARED:
                    record |= _ends(f"difference_{compared.replace(' ', '_')}", value.get(compared))
            elif name == "win_interval":
                record |= {"win_low": value[0] if value else None, "win_high": value[1] if value else None}
            else:
                record[name] = value
        records.append(rounded(record))
    return records


def _ends(name: str, interval: dict[str, Any] | None) -> dict[str, Any]:
    found = interval or {"estimate": None, "low": None, "high": None}
    return {name: found["estimate"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
