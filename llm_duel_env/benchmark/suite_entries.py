"""One entry of a suite: agents on tasks, as runs. See `suite` for the form of the YAML.

Pure functions of what the YAML says: no agent is loaded and no task is made here.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llm_duel_env.benchmark.recipes import recipe_of
from llm_duel_env.benchmark.registry import short_name
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.settings import merged, nested

PLAYED = ("budget", "batch", "eval_every", "eval_prompts")
"""Fields of a `RunConfig` that a task or an entry says as they are."""
OF_TASK = frozenset({"env", "env_kwargs", "seeds", "recipe", *PLAYED})
"""What the settings of a named task may be."""
REQUIRED = frozenset({"env", "agents", "seeds", "budget"})
KNOWN = OF_TASK | {"tasks", "agents", "variants", "sweep", "env_sweep"}


@dataclasses.dataclass(frozen=True)
class Player:
    """An agent as an entry plays it."""

    label: str
    agent: str
    overrides: dict[str, Any]
    recipes: tuple[str, ...]
    """Entries of the task's recipe that it takes, the later over the earlier."""


def entry_runs(entry: Any, tasks: Mapping[str, Any], out: Path) -> list[RunConfig]:
    """The runs of an entry, each with a folder of its own under `out`; agents and settings are not looked up yet.

    Args:
        entry: the YAML's content.
        tasks: settings by name that the entry's `tasks` may name.
        out: where the runs go.

    Raises:
        ValueError: something is missing, unknown or of the wrong form.
    """
    if not isinstance(entry, dict) or set(entry) - KNOWN:
        got = sorted(entry) if isinstance(entry, dict) else entry
        raise ValueError(f"expected {sorted(REQUIRED)} and possibly {sorted(KNOWN - REQUIRED)}, got {got}")
    return [run for told in _on_tasks(entry, tasks) for run in _runs(told, out)]


def elsewhere(entry: Any, tasks: list[str]) -> Any:
    """The entry on other tasks: its agents as they are, all that a task says taken from these."""
    if not isinstance(entry, dict):
        return entry
    return {name: value for name, value in entry.items() if name not in OF_TASK} | {"tasks": tasks}


def _on_tasks(entry: dict[str, Any], tasks: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The entry once for each of its tasks, what it says itself laid over what the task says."""
    if "tasks" not in entry:
        yield entry
        return
    names, own = entry["tasks"], {name: value for name, value in entry.items() if name != "tasks"}
    if "env" in own or not isinstance(names, list) or not names:
        raise ValueError(f"tasks: expected a list of names in the place of 'env', got {names!r} with {sorted(own)}")
    for name in names:
        if name not in tasks:
            raise ValueError(f"tasks: expected some of {sorted(tasks)}, got {name!r}")
        task = tasks[name]
        if not isinstance(task, dict) or set(task) - OF_TASK:
            raise ValueError(f"task {name}: expected some of {sorted(OF_TASK)}, got {task!r}")
        env_kwargs = merged(task.get("env_kwargs") or {}, own.get("env_kwargs") or {})
        yield {**task, **own, "env_kwargs": env_kwargs}


def _runs(entry: dict[str, Any], out: Path) -> list[RunConfig]:
    """The runs of an entry on one task."""
    if REQUIRED - set(entry):
        raise ValueError(f"expected {sorted(REQUIRED)}, got {sorted(entry)}")
    env, played = entry["env"], {name: entry[name] for name in PLAYED if name in entry}
    players = _swept(_varied(_players(entry["agents"]), entry.get("variants") or {}), entry.get("sweep") or {})
    runs = []
    for env_kwargs in _env_settings(entry.get("env_kwargs") or {}, entry.get("env_sweep") or {}):
        for player in players:
            overrides = {**_recipe(entry.get("recipe", True), env, env_kwargs, player), **player.overrides}
            folder = out / slug(env, env_kwargs) / player.label
            first = RunConfig(
                agent=player.agent,
                env=env,
                folder="",
                env_kwargs=env_kwargs,
                overrides=overrides,
                label=player.label,
                **played,
            )
            seeds = _seeds(entry["seeds"])
            runs += [dataclasses.replace(first, seed=s, folder=str(folder / f"seed-{s}")) for s in seeds]
    return runs


def _recipe(told: Any, env: str, env_kwargs: dict[str, Any], player: Player) -> dict[str, Any]:
    """The tuned settings of a player: none where `told` is False, and of the recipe file that it names, if it does."""
    if told is False:
        return {}
    if told is not True and not isinstance(told, str):
        raise ValueError(f"recipe: expected true, false or the name of a recipe, got {told!r}")
    name = None if told is True else told
    found: dict[str, Any] = {}
    for agent in player.recipes:
        found |= recipe_of(env, agent, env_kwargs, name)
    return found


def _players(agents: Any) -> list[Player]:
    if isinstance(agents, list):
        return [Player(short_name(str(agent)), str(agent), {}, (str(agent),)) for agent in agents]
    if not isinstance(agents, dict):
        raise ValueError(f"agents: expected a list of names or a mapping from labels, got {agents!r}")
    found = []
    for label, told in agents.items():
        told = told or {}
        if not isinstance(told, dict) or set(told) - {"agent", "overrides", "recipe"}:
            raise ValueError(f"agents: {label}: expected 'agent', 'overrides' and 'recipe', got {told!r}")
        agent = str(told.get("agent", label))
        found.append(Player(str(label), agent, dict(told.get("overrides") or {}), (str(told.get("recipe", agent)),)))
    return found


def _varied(players: list[Player], variants: Any) -> list[Player]:
    """Each player with each variant's settings; one without settings is the player itself."""
    if not variants:
        return players
    if not isinstance(variants, dict) or not all(told is None or isinstance(told, dict) for told in variants.values()):
        raise ValueError(f"variants: expected settings by name, got {variants!r}")
    found = []
    for player in players:
        for name, told in variants.items():
            if not told:
                found.append(player)
                continue
            # What was tuned for this variant stands in the recipe beside the agent's own, as AGENT+VARIANT.
            recipes = (*player.recipes, *(f"{agent}+{name}" for agent in player.recipes))
            found.append(Player(f"{player.label}+{name}", player.agent, {**player.overrides, **told}, recipes))
    return found


def _swept(players: list[Player], sweep: Any) -> list[Player]:
    """Each player once per value of the one swept setting; unchanged where nothing is swept."""
    if not sweep:
        return players
    setting, values = _one_setting("sweep", sweep)
    return [
        dataclasses.replace(one, label=f"{one.label}@{short(value)}", overrides={**one.overrides, setting: value})
        for one in players
        for value in values
    ]


def _env_settings(env_kwargs: dict[str, Any], sweep: Any) -> list[dict[str, Any]]:
    """The environment's settings, once per value of the one swept setting."""
    if not sweep:
        return [env_kwargs]
    setting, values = _one_setting("env_sweep", sweep)
    return [merged(env_kwargs, nested({setting: value})) for value in values]


def _one_setting(what: str, sweep: Any) -> tuple[str, list[Any]]:
    if not isinstance(sweep, dict) or len(sweep) != 1 or not isinstance(values := next(iter(sweep.values())), list):
        raise ValueError(f"{what}: expected one setting with a list of values, got {sweep!r}")
    return str(next(iter(sweep))), values


def short(value: Any) -> str:
    """A value in a label: 0.03 is 3e-2.

    >>> short(0.03), short(0.00005), short(0.25), short("ee")
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


def slug(env: str, env_kwargs: dict[str, Any]) -> str:
    """An environment and its settings as the name of a folder.

    >>> slug("duel/Synthetic-v0", {"flip_rate": 0.1})
    'Synthetic-v0-flip_rate-0.1'
    """
    name = env.rsplit("/", 1)[-1]
    told = json.dumps(env_kwargs, sort_keys=True) if env_kwargs else ""
    return "-".join([name, *re.findall(r"[\w.]+", told)])
