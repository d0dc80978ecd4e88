"""Finished results that are kept beside the code: one small ``result.json`` per run, below ``benchmark/results``.

A suite's run whose result is kept is not played again, and the board is made of what is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_duel_env.benchmark.outcome import thinned
from llm_duel_env.benchmark.recipes import recipe_name
from llm_duel_env.benchmark.results import Result, find_results
from llm_duel_env.benchmark.run_config import RunConfig, env_kwargs_at, task_of
from llm_duel_env.benchmark.run_folder import RunFolder, read_json, write_json
from llm_duel_env.benchmark.suite import load_suite
from llm_duel_env.benchmark.suite_entries import slug

LARGEST = 10_000
"""Bytes of a kept result, at most."""
SEEDS_WITH_SAMPLES = 2
"""Runs with a lower seed keep sample duels, for the report."""
TEXTS_OF_OURS = ("synthetic", "tiny_tldr")
"""Tasks of whose runs sample duels are kept: their texts are made by the package. Those of a pool, or of prompts in a
file, are somebody's, and results are passed on."""
SAMPLES = 6
"""Of each of them, at most; they too fit into `LARGEST` bytes."""
DERIVED = ("env_spec", "agent_config")
"""What of a result can be made again from its settings, with the code of its commit."""


@dataclass(frozen=True)
class TaskFacts:
    """What a result must agree with, of the task as it is now."""

    fingerprint: str
    heldout: int
    """Held-out prompts."""


def facts_of(env: str, env_kwargs: dict[str, Any]) -> TaskFacts | None:
    """The facts of an environment's task; None where its pool is not at hand, so that nobody can tell."""
    from llm_duel_env.tasks.pool_files import NoPoolError

    try:
        task = task_of(env, env_kwargs)
    except NoPoolError:
        return None
    return TaskFacts(task.fingerprint(), len(task.heldout_ids))


class Kept:
    """Results, and which of them is a given run's."""

    def __init__(
        self,
        found: str | Path | Iterable[Result],
        facts: Callable[[str, dict[str, Any]], TaskFacts | None] = facts_of,
    ) -> None:
        """
        Args:
            found: the results, or the folder that they lie below.
            facts: tells what a task is now.
        """
        if isinstance(found, (str, Path)):
            found = find_results([found])[0] if any(Path(found).rglob("result.json")) else []
        self._results: dict[tuple[str, int], list[Result]] = {}
        for result in found:
            self._results.setdefault((result["env"], result["seed"]), []).append(result)
        self._facts, self._known = facts, dict[str, TaskFacts | None]()

    def result(self, run: RunConfig, *, any_settings: bool = False) -> Result | None:
        """The result of `run`, or None: same agent, environment, seed, budget, batch and evaluation, and the same
        settings, on the task as it is now. One that was played under another label is given the run's.

        `any_settings` takes one of the run's label with other settings of the agent too.
        """
        label = run.label or run.agent
        found = [each for each in self._results.get((run.env, run.seed), []) if self._played_alike(each, run)]
        of_label = [result for result in found if result["label"] == label]
        for result in [*of_label, *found]:
            if same_settings(result, run):
                return {**result, "label": label}
        return of_label[0] if any_settings and of_label else None

    def seconds_per_query(self, agent: str, env: str) -> float | None:
        """How long an agent took for a query on an environment, the mean of what is kept; None where nothing is."""
        found = [r for (of, _), results in self._results.items() if of == env for r in results if r["agent"] == agent]
        rates = [result["seconds"] / result["queries"] for result in found if result.get("queries")]
        return sum(rates) / len(rates) if rates else None

    def _played_alike(self, result: Result, run: RunConfig) -> bool:
        told = ("agent", "budget", "batch", "env_kwargs")
        if any(result[name] != getattr(run, name) for name in told):
            return False
        if result.get("eval_every") not in (None, run.eval_every):  # older results do not tell
            return False
        facts = self._task(run)
        if facts is None:
            return result["eval_prompts"] <= run.eval_prompts
        prompts = min(run.eval_prompts, facts.heldout)
        return result["eval_prompts"] == prompts and result.get("fingerprint") in (None, facts.fingerprint)

    def _task(self, run: RunConfig) -> TaskFacts | None:
        env_kwargs = env_kwargs_at(run.env_kwargs, run.seed)
        key = json.dumps([run.env, env_kwargs], sort_keys=True)
        if key not in self._known:
            self._known[key] = self._facts(run.env, env_kwargs)
        return self._known[key]


def of_suite(suite: str, results: Iterable[Result]) -> tuple[list[Result], int]:
    """The results of a suite's runs, under its labels, and how many of its runs have none.

    Raises:
        ValueError: no run has one.
    """
    kept, runs = Kept(results), load_suite(suite, "runs")
    found = [result for run in runs if (result := kept.result(run)) is not None]
    if not found:
        raise ValueError(f"suite {suite}: expected results of some of its {len(runs)} runs, got none")
    return found, len(runs) - len(found)


def same_settings(result: Result, run: RunConfig) -> bool:
    """Whether the agent was told the same."""
    return _plain(result["overrides"]) == _plain(run.overrides)


def keep(runs: Iterable[RunConfig], folder: str | Path, *, by_task: bool = False) -> list[Path]:
    """Copies the results of the runs that are over to ``folder/LABEL/seed-N/result.json``; returns their paths.

    Of the first seeds a few sample duels go with them, as ``samples.jsonl``, where their texts are `TEXTS_OF_OURS`.

    `by_task` puts the environment with its settings before the label: for suites with several.
    """
    kept = []
    for run in runs:
        path = RunFolder(run.folder).result
        if path.exists():
            where = Path(folder) / slug(run.env, run.env_kwargs) if by_task else Path(folder)
            target = where / (run.label or run.agent) / f"seed-{run.seed}" / "result.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json(target, fitted(read_json(path)), indent=None)
            if run.seed < SEEDS_WITH_SAMPLES and recipe_name(run.env, run.env_kwargs) in TEXTS_OF_OURS:
                keep_samples(RunFolder(run.folder).samples, target.with_name("samples.jsonl"))
            kept.append(target)
    return kept


def keep_samples(path: Path, target: Path) -> None:
    """Copies `SAMPLES` sample duels of a run, evenly spread, fewer where they are long; nothing where it has none."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    lines = [lines[i] for i in thinned(len(lines), SAMPLES)]
    while sum(map(len, lines)) > LARGEST:
        lines = _every_other(lines) if len(lines) > 1 else []
    if lines:
        target.write_bytes(b"".join(lines))


def fitted(result: dict[str, Any], most: int = LARGEST) -> dict[str, Any]:
    """The result in at most `most` bytes of JSON: where it is larger, what follows from its settings and its code is
    left out (`DERIVED`), then every other evaluation of its curve; the last one stays.

    Raises:
        ValueError: it does not fit, however short its curve.
    """
    for name in DERIVED:
        if len(json.dumps(result)) + 1 > most:
            result = {about: value for about, value in result.items() if about != name}
    while len(json.dumps(result)) + 1 > most:
        points = len(next(iter(result["curve"].values())))
        if points < 3:
            raise ValueError(f"a result of {result['label']} does not fit into {most} bytes")
        result = {**result, "curve": {name: _every_other(values) for name, values in result["curve"].items()}}
    return result


def _every_other(values: Sequence[Any]) -> list[Any]:
    return list(values)[::-1][::2][::-1]


def _plain(settings: dict[str, Any]) -> str:
    """Settings as JSON, numbers that were written as text among them read as numbers."""

    def number(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return list(value) if isinstance(value, tuple) else value
        try:
            return float(value)
        except ValueError:
            return value

    return json.dumps({name: number(value) for name, value in settings.items()}, sort_keys=True)
