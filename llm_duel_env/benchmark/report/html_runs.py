"""The report's sections on single agents: their settings, their runs one by one, and sample duels as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_duel_env.benchmark.leaderboard import Row, Table
from llm_duel_env.benchmark.outcome import thinned
from llm_duel_env.benchmark.report import text
from llm_duel_env.benchmark.report.html_charts import Chart, Series, line_chart
from llm_duel_env.benchmark.report.html_table import marks
from llm_duel_env.benchmark.results import Result, last, reached, regret, win_curve
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.run_folder import RunFolder, read_json
from llm_duel_env.benchmark.runner import command_line
from llm_duel_env.benchmark.samples import Sample, cut, read_samples

RUNS_WITH_SAMPLES = 2
"""Runs of each agent, in the order of their seeds, whose sample duels are shown."""
SAMPLES = 6
"""Sample duels shown of each of them, spread over the run."""
LONGEST = 1200
"""Characters of a text that are shown."""
COMMANDS = 5
"""Sittings of a run whose commands are shown."""
FIGURES = ("offline win rate", "queries to target", "online win rate", "regret", "KL", "queries", "seconds", "status")
"""Of a run."""
UNKNOWN = "not kept with this result"
HARDWARE = ("machine", "system", "cpu", "cpus", "memory_gb", "gpus", "threads", "OMP_NUM_THREADS")
CODE = ("commit", "changed", "source_sha256")


@dataclass(frozen=True)
class Run:
    """One run: what it scored, and what it takes to play it again."""

    seed: int
    figures: list[str]
    """Under `FIGURES`."""
    facts: list[tuple[str, str]]
    """Name and value: command, versions, hashes."""
    samples: list[Sample]
    more: int
    """Samples in the file that are not shown."""

    @property
    def shown(self) -> int:
        """Sample duels that are shown."""
        return len(self.samples)


@dataclass(frozen=True)
class AgentSection:
    """One agent's part of a table's section."""

    label: str
    marks: list[str]
    changed: list[tuple[str, str]]
    """Settings that differ from the method's defaults."""
    settings: list[tuple[str, str]]
    """All of them, where the result tells."""
    told: list[str]
    """What the agent is told beyond duels."""
    chart: Chart
    """The learning curve of each seed."""
    runs: list[Run]


def sections(table: Table) -> list[AgentSection]:
    """The agents of a table, in its order."""
    return [_section(table, row) for row in table.rows]


def verdict(sample: Sample) -> str:
    """Who won a sample duel, and who said so."""
    if sample.first_wins is None:
        return "Left out: nobody was asked."
    if sample.same:
        return "The same response twice: a tie by definition, not paid for."
    who = "The oracle" if sample.labelled_by == "oracle" else "The agent itself, at no cost,"
    if sample.first_wins == 0.5:
        return f"{who} called it a tie."
    return f"{who} preferred the {'first' if sample.first_wins > 0.5 else 'second'}."


def percent(probability: float) -> float:
    """A probability in per cent, kept within its range."""
    return float(np.clip(100 * probability, 0, 100))


def shown_text(told: str) -> str:
    """A text as long as a report shows it."""
    return cut(told, LONGEST)


def _section(table: Table, row: Row) -> AgentSection:
    by_seed = dict(sorted(table.results[row.label].items()))
    first = next(iter(by_seed.values()))
    guides = [(table.target, f"target {table.target:.3f}")] if table.target is not None else []
    chart = line_chart(
        [Series(f"seed {seed}", *win_curve(result)) for seed, result in by_seed.items()],
        name="seeds",
        title=f"{row.label}, seed by seed",
        about="One line per seed.",
        x_label="oracle queries",
        y_label="offline win rate",
        x_range=(0, table.budget),
        guides=guides,
        marks=0,
    )
    return AgentSection(
        row.label,
        marks(row),
        [(name, plain(value)) for name, value in sorted(first["overrides"].items())],
        [(name, plain(value)) for name, value in flat(first.get("agent_config") or {}).items()],
        list(first["needs"]),
        chart,
        [_run(table, result, number < RUNS_WITH_SAMPLES) for number, result in enumerate(by_seed.values())],
    )


def _run(table: Table, result: Result, with_samples: bool) -> Run:
    folder = Path(result["folder"]) if result.get("folder") else None
    found = read_samples(RunFolder(folder).samples) if folder else []
    shown = [found[i] for i in thinned(len(found), SAMPLES)] if with_samples else []
    return Run(result["seed"], _figures(table, result), _facts(result, folder), shown, len(found) - len(shown))


def _figures(table: Table, result: Result) -> list[str]:
    wins = win_curve(result)[1]
    low, high = last(result, "win_low"), last(result, "win_high")
    at = None if table.target is None else reached(result, table.target)
    never = text.NONE if table.target is None else "never"
    return [
        text.number(float(wins[-1]), ".3f", (low, high) if low is not None and high is not None else None),
        never if at is None else f"{at:,.0f}",
        text.number(result["online_win_rate"], ".3f"),
        text.number(regret(result), ",.1f"),
        text.number(last(result, "kl"), ".2f"),
        text.number(result.get("queries"), ",.0f"),
        text.number(result["seconds"], ",.1f"),
        str(result["status"]),
    ]


def _facts(result: Result, folder: Path | None) -> list[tuple[str, str]]:
    """What it takes to play the run again, and what it was played on, as far as the run tells."""
    facts = [("command", command) for command in _commands(result, folder)]
    versions = _versions(result, folder)
    packages = [name for name in versions if name not in {*HARDWARE, *CODE, "fingerprint"}]
    for name, keys in (("hardware", HARDWARE), ("versions", packages), ("code", CODE)):
        told = ", ".join(f"{key} {plain(versions[key])}" for key in keys if versions.get(key) is not None)
        facts.append((name, told or UNKNOWN))
    if source := result.get("agent_source"):
        facts.append(("agent", ", ".join(f"{key} {value}" for key, value in dict(source).items())))
    for name, key in (("ledger SHA-256", "ledger_sha256"), ("task fingerprint", "fingerprint")):
        facts.append((name, str(result.get(key) or UNKNOWN)))
    spent = {key: value for key, value in dict(result.get("time") or {}).items() if "/" not in key}
    if spent:
        told = ", ".join(f"{key} {text.number(value, ',.1f')}" for key, value in spent.items())
        facts.append(("seconds by kind of work", told))
    return facts


def _commands(result: Result, folder: Path | None) -> list[str]:
    """The commands of the run's sittings, or the one that would play it, made from its result."""
    path = folder / "command.txt" if folder else None
    if path is not None and path.exists():
        return [shown_text(line) for line in path.read_text(errors="replace").splitlines()[:COMMANDS]]
    names = ("agent", "env", "seed", "budget", "batch", "overrides", "env_kwargs", "eval_prompts")
    told = {name: result[name] for name in names}
    if result.get("eval_every") is not None:
        told["eval_every"] = result["eval_every"]
    try:
        config = RunConfig(**told, folder=f"runs/{result['agent']}/seed-{result['seed']}")
        return [f"{shown_text(command_line(config, resume=False))}  (made from the result)"]
    except (ValueError, TypeError):  # a result of another make
        return []


def _versions(result: Result, folder: Path | None) -> dict[str, Any]:
    path = folder / "versions.json" if folder else None
    found = read_json(path) if path is not None and path.exists() else result.get("versions")
    return found if isinstance(found, dict) else {}


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings within settings by dotted name.

    >>> flat({"policy": {"batch": 8}, "beta": 0.1})
    {'policy.batch': 8, 'beta': 0.1}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{before}{name}.")
        else:
            found[before + name] = value
    return found


def plain(value: Any) -> str:
    """A setting as text.

    >>> plain(1e-4), plain(True), plain(["a", "b"])
    ('0.0001', 'true', 'a, b')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
