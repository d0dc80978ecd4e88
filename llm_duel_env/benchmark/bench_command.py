"""What `llm-duel bench` is told: which runs of a suite are to be played, on which pool, and what of them is over."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from llm_duel_env.benchmark.recipes import recipe_name
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.run_folder import RunFolder
from llm_duel_env.benchmark.stored import Kept
from llm_duel_env.benchmark.suite import load_suite, select
from llm_duel_env.benchmark.suite_entries import slug
from llm_duel_env.options import Bench
from llm_duel_env.tasks.pool_files import WHERE

HOW = (
    "make a pool with `llm-duel pool build DATA --encoder ENCODER --out pool` (docs/pools.md) and name it with "
    f"--pool pool or the environment variable {WHERE}"
)


def selected(told: Bench, out: Path) -> tuple[list[RunConfig], list[RunConfig]]:
    """The runs that are to be played, and all of the suite's.

    Raises:
        ValueError: no such suite, `--only` names none of its runs, there is no pool at `--pool`, or all the runs need a
            pool and there is none.
    """
    whole = load_suite(told.suite, out)
    if told.pool is not None:
        if not (told.pool / "pool.json").is_file():
            raise ValueError(f"--pool: expected a folder with a pool, got {told.pool}; {HOW}")
        os.environ[WHERE] = str(told.pool.resolve())  # the processes that play inherit it, and no result names it
    return playable(select(whole, told.only) if told.only else whole), whole


def playable(runs: list[RunConfig]) -> list[RunConfig]:
    """The runs without those that need a pool, where there is none; says loudly how many those are.

    Raises:
        ValueError: all of them need one.
    """
    without = [run for run in runs if needs_pool(run)]
    if not without or os.environ.get(WHERE):
        return runs
    if len(without) == len(runs):
        raise ValueError(f"all {len(runs)} runs play on a pool, and there is none; {HOW}")
    print(f"LEFT OUT: {len(without)} of {len(runs)} runs play on a pool, and there is none; {HOW}", file=sys.stderr)
    return [run for run in runs if not needs_pool(run)]


def needs_pool(run: RunConfig) -> bool:
    """Whether a run plays on a pool that its settings do not name."""
    told = run.env_kwargs.get("task_kwargs") or {}
    return recipe_name(run.env, run.env_kwargs) == "pool" and not told.get("folder")


def tasks_of(runs: Sequence[RunConfig]) -> list[str]:
    """The environments, with their settings, that runs play on: names of folders, in order."""
    return list(dict.fromkeys(slug(run.env, run.env_kwargs) for run in runs))


def table(runs: Sequence[RunConfig], kept: Kept | None) -> Table:
    """What the runs are and what of them is over, a row for each task and label and one for all: for the terminal.

    Hours are those of one process for what is left, at the pace of kept results of the same agent on the same
    environment; where there are none they are not known, and their sum is a lower bound.

    Args:
        runs: of a suite.
        kept: results beside the code, which count as over.
    """
    made = Table(title=f"{len(runs)} runs", title_justify="left")
    made.add_column("task", overflow="fold")
    made.add_column("label", no_wrap=True)
    for name in ("runs", "over", "kept", "to play", "queries to buy", "hours"):
        made.add_column(name, justify="right")
    total, hours = [0, 0, 0, 0, 0], list[float | None]()
    for task in tasks_of(runs):
        on_task = [run for run in runs if slug(run.env, run.env_kwargs) == task]
        for label in dict.fromkeys(run.label for run in on_task):
            numbers, more = _numbers([run for run in on_task if run.label == label], kept)
            made.add_row(task, label, *map(str, numbers), "–" if more is None else f"{more:.2f}")
            total, hours = [one + other for one, other in zip(total, numbers, strict=True)], [*hours, more]
        made.add_section()
    known = [each for each in hours if each is not None]
    bound = ">" if len(known) < len(hours) else ""
    made.add_row("all", "", *map(str, total), f"{bound}{sum(known):.2f}" if known else "–")
    return made


def _numbers(runs: Sequence[RunConfig], kept: Kept | None) -> tuple[list[int], float | None]:
    """Runs, those over in their folders, those kept, those to be played, and the queries that these will buy; and the
    hours of these, None where nobody knows."""
    stored = [kept is not None and kept.result(run) is not None for run in runs]
    over = [not known and RunFolder(run.folder).result.exists() for run, known in zip(runs, stored, strict=True)]
    left = [run for run, known, done in zip(runs, stored, over, strict=True) if not known and not done]
    queries = sum(run.budget for run in left)
    pace = kept.seconds_per_query(runs[0].agent, runs[0].env) if kept is not None and left else None
    known = 0.0 if not left else None if pace is None else queries * pace / 3600
    return [len(runs), sum(over), sum(stored), len(left), queries], known
