"""Everything that a leaderboard leaves in a folder."""

from __future__ import annotations

from pathlib import Path

from llm_duel_env.benchmark.leaderboard import Table
from llm_duel_env.benchmark.report import figures, plots, table
from llm_duel_env.benchmark.report.records import arrow, write_parquet


def check(out: Path | None, parquet: bool) -> None:
    """Checks that what is asked for can be written, before any result is read.

    Raises:
        ValueError: Parquet without a folder.
        MissingExtraError: Parquet without pyarrow.
    """
    if parquet:
        if out is None:
            raise ValueError("leaderboard --parquet: expected --out FOLDER with it")
        arrow()


def write(tables: list[Table], folder: Path, *, parquet: bool = False) -> list[Path]:
    """Markdown, CSV, JSON and figures of `tables`, and Parquet where asked for; returns the paths."""
    paths = [*table.write(tables, folder), *plots.write(tables, folder), *figures.write(tables, folder)]
    return [*paths, write_parquet(tables, folder / "leaderboard.parquet")] if parquet else paths
