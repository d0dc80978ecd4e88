"""Suites: which runs a comparison consists of, as YAML.

name: demo
entries:
  - env: duel/Synthetic-v0
    env_kwargs: {task_kwargs: {candidates: 64}}
    agents: [uniform, sea]            # or {label: {agent: sea, overrides: {policy.learning_rate: 1e-4}}}
    seeds: 5                          # 0 to 4, or a list
    budget: 2000                      # also: batch, eval_every, eval_prompts, recipe
    sweep: {policy.learning_rate: [1.0e-4, 2.0e-4]}   # each agent with each value, labelled sea@1e-4, sea@2e-4
"""

from __future__ import annotations

import dataclasses
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from llm_duel_env.benchmark.recipes import recipe_of
from llm_duel_env.benchmark.registry import unknown
from llm_duel_env.benchmark.run_config import RunConfig, check

REQUIRED = {"env", "agents", "seeds", "budget"}
PASSED_ON = {"budget", "batch", "eval_every", "eval_prompts"}
KNOWN = REQUIRED | PASSED_ON | {"env_kwargs", "recipe", "sweep"}


def list_suites() -> list[str]:
    """Names of the suites that come with the package, sorted."""
    return sorted(f.name[: -len(".yaml")] for f in _folder().iterdir() if f.name.endswith(".yaml"))


def load_suite(name: str, out: str | Path) -> list[RunConfig]:
    """The runs of a suite, each with a folder of its own under `out`; all of them checked.

    Args:
        name: a suite of the package, or the path of a YAML file.
        out: where the runs go.

    Raises:
        ValueError: no such suite, or one of its entries cannot be run; says which.
    """
    return expand(read_suite(name), out)


def read_suite(name: str) -> Any:
    """The YAML's content of a suite, as it stands there.

    Raises:
        ValueError: no such suite, or it is not YAML.
    """
    file = Path(name) if Path(name).is_file() else _folder() / f"{name}.yaml"
    if not file.is_file():
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
    if not isinstance(suite, dict) or not isinstance(suite.get("entries"), list) or not suite["entries"]:
        raise ValueError("a suite: expected a mapping with 'name' and a list 'entries'")
    runs: list[RunConfig] = []
    for number, entry in enumerate(suite["entries"]):
        try:
            runs += _expand_entry(entry, Path(out))
        except (ValueError, TypeError) as error:
            raise ValueError(f"suite {suite.get('name', '?')}, entry {number}: {error}") from None
    folders = [run.folder for run in runs]
    twice = sorted({folder for folder in folders if folders.count(folder) > 1})
    if twice:
        raise ValueError(f"suite {suite.get('name', '?')}: these runs are there twice, give them labels: {twice}")
    return runs


def _expand_entry(entry: Any, out: Path) -> list[RunConfig]:
    if not isinstance(entry, dict) or REQUIRED - set(entry) or set(entry) - KNOWN:
        got = sorted(entry) if isinstance(entry, dict) else entry
        raise ValueError(f"expected {sorted(REQUIRED)} and possibly {sorted(KNOWN - REQUIRED)}, got {got}")
    env, env_kwargs = entry["env"], entry.get("env_kwargs") or {}
    common = {name: entry[name] for name in PASSED_ON & set(entry)}
    runs = []
    for label, agent, overrides in _swept(_agents(entry["agents"]), entry.get("sweep") or {}):
        recipe = recipe_of(env, agent, env_kwargs) if entry.get("recipe", True) else {}
        folder = out / _slug(env, env_kwargs) / label
        first = RunConfig(
            agent=agent,
            env=env,
            folder="",
            env_kwargs=env_kwargs,
            overrides={**recipe, **overrides},
            label=label,
            **common,
        )
        check(first)
        runs += [dataclasses.replace(first, seed=s, folder=str(folder / f"seed-{s}")) for s in _seeds(entry["seeds"])]
    return runs


def _agents(agents: Any) -> list[tuple[str, str, dict[str, Any]]]:
    """(label, agent, overrides) of each."""
    if isinstance(agents, list):
        return [(str(agent), str(agent), {}) for agent in agents]
    if not isinstance(agents, dict):
        raise ValueError(f"agents: expected a list of names or a mapping from labels, got {agents!r}")
    found = []
    for label, told in agents.items():
        told = told or {}
        if not isinstance(told, dict) or set(told) - {"agent", "overrides"}:
            raise ValueError(f"agents: {label}: expected 'agent' and 'overrides', got {told!r}")
        found.append((str(label), str(told.get("agent", label)), dict(told.get("overrides") or {})))
    return found


def _swept(
    agents: list[tuple[str, str, dict[str, Any]]], sweep: dict[str, list[Any]]
) -> list[tuple[str, str, dict[str, Any]]]:
    """Each agent once per value of the one swept setting; unchanged where nothing is swept."""
    if not sweep:
        return agents
    if not isinstance(sweep, dict) or len(sweep) != 1 or not isinstance(values := next(iter(sweep.values())), list):
        raise ValueError(f"sweep: expected one setting with a list of values, got {sweep!r}")
    setting = next(iter(sweep))
    return [(f"{label}@{_short(v)}", agent, {**told, setting: v}) for label, agent, told in agents for v in values]


def _short(value: Any) -> str:
    """A value in a label: 0.03 is 3e-2.

    >>> _short(0.03), _short(0.00005), _short(0.25), _short("ee")
    ('3e-2', '5e-5', '2.5e-1', 'ee')
    """
    if not isinstance(value, float):
        return str(value)
    digits, exponent = f"{value:.3e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def _seeds(seeds: Any) -> list[int]:
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        return list(range(seeds))
    if isinstance(seeds, list) and seeds:
        return seeds
    raise ValueError(f"seeds: expected how many or a list, got {seeds!r}")


def _slug(env: str, env_kwargs: dict[str, Any]) -> str:
    name = env.rsplit("/", 1)[-1]
    told = json.dumps(env_kwargs, sort_keys=True) if env_kwargs else ""
    return "-".join([name, *re.findall(r"[\w.]+", told)])


def _folder() -> Any:
    return resources.files("llm_duel_env.benchmark") / "suites"
