"""Suites: which runs a comparison consists of, as YAML.

name: demo
entries:
  - env: duel/Synthetic-v0
    env_kwargs: {task_kwargs: {candidates: 64}}
    agents: [uniform, sea]            # or {label: {agent: sea, overrides: {policy.learning_rate: 1e-4}}}; recipe: AGENT
                                      # beside them takes the tuned settings of another agent
    seeds: 5                          # 0 to 4, or a list
    budget: 2000                      # also: batch, eval_every, eval_prompts, recipe (true, false, or a recipe's name)
    sweep: {policy.learning_rate: [1.0e-4, 2.0e-4]}   # each agent with each value, labelled sea@1e-4, sea@2e-4
    variants: {dpo: {}, ipo: {loss: ipo}}             # each agent with each variant, labelled sea, sea+ipo
    env_sweep: {flip_rate: [0.1, 0.2]}                # on the environment with each value
tasks:                                # what several entries have in common, by name; `suites/_tasks.yaml` has some
  small: {env: duel/Synthetic-v0, seeds: 5, budget: 500}
  # ... and in an entry, in the place of env, seeds, ...:    tasks: [small, pool]
include:                              # the runs of other suites
  - spine-synthetic
  - {suite: board-synthetic, tasks: [pool], only: ["sea*"], without: [sea-ee]}    # its agents on another task
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from llm_duel_env.benchmark.recipes import recipe_name
from llm_duel_env.benchmark.registry import unknown
from llm_duel_env.benchmark.run_config import RunConfig, check
from llm_duel_env.benchmark.suite_entries import elsewhere, entry_runs, slug

SHARED = "_tasks"
"""The file of task settings that all suites know; no suite itself."""
KNOWN = {"name", "tasks", "include", "entries"}


def list_suites() -> list[str]:
    """Names of the suites that come with the package, sorted."""
    names = (f.name[: -len(".yaml")] for f in _folder().iterdir() if f.name.endswith(".yaml"))
    return sorted(name for name in names if name != SHARED)


def load_suite(name: str, out: str | Path) -> list[RunConfig]:
    """The runs of a suite, each with a folder of its own under `out`; all of them checked.

    Args:
        name: a suite of the package, or the path of a YAML file.
        out: where the runs go.

    Raises:
        ValueError: no such suite, or one of its entries cannot be run; says which.
    """
    return expand(read_suite(name), out)


def planned(name: str, out: str | Path) -> list[RunConfig]:
    """The same runs, their agents and settings not looked up: for counting, in no time.

    Raises:
        ValueError: no such suite, or it is not of a suite's form.
    """
    return _Reader(Path(out), checked=False).runs(read_suite(name))


def read_suite(name: str) -> Any:
    """The YAML's content of a suite, as it stands there.

    Raises:
        ValueError: no such suite, or it is not YAML.
    """
    file = Path(name) if Path(name).is_file() else _folder() / f"{name}.yaml"
    if not file.is_file() or name == SHARED:
        raise unknown("suite", name, list_suites())
    try:
        return yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"suite {name} is not YAML: {error}") from None


def expand(suite: Any, out: str | Path) -> list[RunConfig]:
    """The runs of a suite given as the YAML's content; see the module for its form.

    Raises:
        ValueError: something is missing, unknown or twice there; says where.
    """
    return _Reader(Path(out), checked=True).runs(suite)


def select(runs: Sequence[RunConfig], patterns: Iterable[str]) -> list[RunConfig]:
    """The runs that one of the patterns names, in their order.

    Args:
        runs: of a suite.
        patterns: ``LABEL`` or ``TASK/LABEL``, where TASK is the environment (``Pool-v0``), its task (``pool``,
            ``tiny-tldr``) or the folder's name with the environment's settings; ``*``, ``?`` and ``[..]`` as in file
            names, small and capital letters alike.

    Raises:
        ValueError: a pattern that names none; says what there is.
    """
    found: set[int] = set()
    for pattern in patterns:
        named = {number for number, run in enumerate(runs) if _named(run, pattern.lower())}
        if not named:
            known = dict.fromkeys(f"{slug(run.env, run.env_kwargs)}/{run.label}" for run in runs)
            raise ValueError(f"no run is named by {pattern!r}; there are: {', '.join(known)}")
        found |= named
    return [runs[number] for number in sorted(found)]


def _named(run: RunConfig, pattern: str) -> bool:
    task, slash, label = pattern.rpartition("/")
    task_name = recipe_name(run.env, run.env_kwargs)
    where = (run.env.rsplit("/", 1)[-1], task_name, task_name.replace("_", "-"), slug(run.env, run.env_kwargs))
    return fnmatchcase(run.label.lower(), label) and (
        not slash or any(fnmatchcase(name.lower(), task) for name in where)
    )


class _Reader:
    """Reads a suite, and those that it includes."""

    def __init__(self, out: Path, *, checked: bool) -> None:
        self.out, self.checked = out, checked
        self._fine: set[str] = set()  # agents with their settings that were checked

    def runs(self, suite: Any, elsewhere_on: list[str] | None = None, within: tuple[str, ...] = ()) -> list[RunConfig]:
        """The runs of a suite; `elsewhere_on` names other tasks to play its entries on, and `within` the suites that
        include it."""
        if not isinstance(suite, dict) or not (suite.get("entries") or suite.get("include")):
            raise ValueError("a suite: expected a mapping with 'name' and a list 'entries', or 'include'")
        name = suite.get("name", "?")
        if set(suite) - KNOWN:
            raise ValueError(f"suite {name}: expected some of {sorted(KNOWN)}, got {sorted(suite)}")
        for part in ("include", "entries"):
            if not isinstance(suite.get(part) or [], list):
                raise ValueError(f"suite {name}: {part}: expected a list, got {suite[part]!r}")
        own: list[RunConfig] = []
        tasks = {**_shared(), **(suite.get("tasks") or {})}
        for number, entry in enumerate(suite.get("entries") or []):
            try:
                made = entry_runs(elsewhere(entry, elsewhere_on) if elsewhere_on else entry, tasks, self.out)
                for run in made:
                    self._check(run)
            except (ValueError, TypeError) as error:
                raise ValueError(f"suite {name}, entry {number}: {error}") from None
            own += made
        folders = [run.folder for run in own]
        twice = (
            sorted({folder for folder in folders if folders.count(folder) > 1}) if len(set(folders)) < len(own) else []
        )
        if twice:
            raise ValueError(f"suite {name}: these runs are there twice, give them labels: {twice}")
        parts = [self._included(part, name, elsewhere_on, within, tasks) for part in suite.get("include") or []]
        return _once(name, [*(run for part in parts for run in part), *own])

    def _included(
        self, part: Any, by: str, elsewhere_on: list[str] | None, within: tuple[str, ...], tasks: dict[str, Any]
    ) -> list[RunConfig]:
        told = {"suite": part} if isinstance(part, str) else part
        if not isinstance(told, dict) or "suite" not in told or set(told) - {"suite", "tasks", "only", "without"}:
            wanted = "expected a suite's name, or 'suite' with 'tasks', 'only', 'without'"
            raise ValueError(f"suite {by}: include: {wanted}, got {part!r}")
        if by in within:
            raise ValueError(f"suite {by} includes itself: {' > '.join([*within, by])}")
        inner = read_suite(str(told["suite"]))
        on = elsewhere_on or told.get("tasks")  # who includes both decides
        if on and isinstance(inner, dict):  # the tasks that this suite names are to be known in the other
            inner = {**inner, "tasks": {**tasks, **(inner.get("tasks") or {})}}
        runs = self.runs(inner, on, (*within, by))
        try:
            if told.get("only"):
                runs = select(runs, told["only"])
            left_out = {run.folder for run in select(runs, told.get("without") or [])}
        except ValueError as error:
            raise ValueError(f"suite {by}, include {told['suite']}: {error}") from None
        return [run for run in runs if run.folder not in left_out]

    def _check(self, run: RunConfig) -> None:
        if not self.checked:
            return
        key = json.dumps([run.agent, run.env, run.overrides], sort_keys=True, default=str)
        if key not in self._fine:
            check(run)
            self._fine.add(key)


def _once(name: str, runs: list[RunConfig]) -> list[RunConfig]:
    """The runs, those that came from several places once.

    Raises:
        ValueError: two different runs in one folder.
    """
    found: dict[str, RunConfig] = {}
    for run in runs:
        if found.setdefault(run.folder, run) != run:
            raise ValueError(f"suite {name}: two different runs would go to {run.folder}; give one another label")
    return list(found.values())


@functools.cache
def _shared() -> dict[str, Any]:
    return yaml.safe_load((_folder() / f"{SHARED}.yaml").read_text())


def _folder() -> Any:
    return resources.files("llm_duel_env.benchmark") / "suites"
