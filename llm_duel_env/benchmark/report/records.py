"""All figures of all rows as flat records: CSV and Parquet, and the curves behind the figures as CSV."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_duel_env.benchmark.leaderboard import Table
from llm_duel_env.benchmark.matched import matched
from llm_duel_env.benchmark.profiles import common_grid, sample_efficiency
from llm_duel_env.benchmark.results import BELIEFS, COMPARED, win_curve
from llm_duel_env.benchmark.run_folder import finite, rounded
from llm_duel_env.benchmark.statistics import SEEDS_NEEDED
from llm_duel_env.extras import require

Record = dict[str, Any]


def records(tables: Sequence[Table]) -> list[Record]:
    """One record per agent and table, all with the same names; None where a figure does not exist. Levels of matched KL
    that no table has are left out."""
    made = [record for table in tables for record in _of_table(table)]
    names = list(dict.fromkeys(name for record in made for name in record))
    return [{name: record.get(name) for name in names} for record in made]


def csv_text(tables: Sequence[Table]) -> str:
    """All rows as CSV, one line per agent and environment, at full width."""
    return _csv(records(tables))


def write_parquet(tables: Sequence[Table], path: Path) -> Path:
    """Writes the same as a Parquet file; returns its path.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    pyarrow = arrow()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records(tables)), path)
    return path


def arrow() -> Any:
    """pyarrow with its Parquet writer.

    Raises:
        MissingExtraError: it is not installed.
    """
    found = require("pyarrow", "leaderboard --parquet")
    importlib.import_module("pyarrow.parquet")
    return found


def curves_csv(tables: Sequence[Table]) -> str:
    """Sample efficiency as CSV: mean and interquartile mean over seeds of the offline win rate at common queries, each
    with its 95% bootstrap interval where there are seeds enough."""
    lines: list[Record] = []
    for table in tables:
        grid = common_grid(table.budget)
        for row in table.rows:
            curves = [win_curve(result) for result in table.results[row.label].values()]
            enough = len(curves) >= SEEDS_NEEDED[table.kind]
            bands = {name: sample_efficiency(curves, grid, name) for name in ("mean", "iqm")}
            for i, queries in enumerate(grid):
                line: Record = {**_place(table), "label": row.label, "seeds": row.seeds, "queries": float(queries)}
                for name, band in bands.items():
                    line[name] = float(band.estimate[i])
                    line[f"{name}_low"] = float(band.low[i]) if enough else None
                    line[f"{name}_high"] = float(band.high[i]) if enough else None
                lines.append(rounded(line))
    return _csv(lines)


def _place(table: Table) -> Record:
    settings = json.dumps(table.env_kwargs, sort_keys=True)
    return {"env": table.env, "env_kwargs": settings, "budget": table.budget, "feedback": table.feedback}


def _of_table(table: Table) -> list[Record]:
    at_levels = matched(table)
    made = []
    for row in table.rows:
        record: Record = {**_place(table), "batch": table.batch, "eval_prompts": table.eval_prompts}
        record |= {"asks": " ".join(table.asks), "target": table.target}
        for name, value in dataclasses.asdict(row).items():
            if name in ("ratio", "rank"):
                record |= _ends(name, value)
            elif name == "differences":
                for compared in COMPARED:
                    record |= _ends(f"difference_{compared.replace(' ', '_')}", value.get(compared))
            elif name == "win_interval":
                record |= {"win_low": value[0] if value else None, "win_high": value[1] if value else None}
            elif name == "improvement_interval":
                low, high = value or (None, None)
                record |= {"improvement_low": low, "improvement_high": high}
            elif name == "tied":
                record[name] = " ".join(value)
            elif name == "beliefs":
                record |= {f"belief_{belief}": value.get(belief) for belief in BELIEFS}
            else:
                record[name] = value
        for level in at_levels.levels:
            found = at_levels.agents[row.label].get(level)
            name = f"win_rate_at_kl_{level:g}"
            low, high = (found.interval if found else None) or (None, None)
            record |= {name: found.win_rate if found else None, f"{name}_low": low, f"{name}_high": high}
            difference = found.difference if found else None
            record |= _ends(f"difference_at_kl_{level:g}", dataclasses.asdict(difference) if difference else None)
        made.append(rounded(record))
    return made


def _ends(name: str, interval: Record | None) -> Record:
    found = finite(interval) if interval else {"estimate": None, "low": None, "high": None}
    return {name: found["estimate"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def _csv(lines: Sequence[Record]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
