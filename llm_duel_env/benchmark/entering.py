"""One agent into a leaderboard: what `llm-duel enter` plays, and beside what it shows it."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_duel_env.benchmark.recipes import recipe_of
from llm_duel_env.benchmark.registry import short_name
from llm_duel_env.benchmark.run_config import RunConfig, check
from llm_duel_env.benchmark.stored import Kept
from llm_duel_env.benchmark.suite import load_suite
from llm_duel_env.options import Enter


@dataclass(frozen=True)
class Entry:
    """What there is to play and to show."""

    runs: list[RunConfig]
    """The agent's, and those of the agents beside it that no kept results stand for."""
    kept: list[Path]
    """Folders of kept results that stand in the table."""
    out: Path
    """Where the runs go."""


def entry_of(told: Enter) -> Entry:
    """The entry that the command describes.

    Raises:
        ValueError: no such suite or agent, or the agent is among those beside it.
    """
    out = told.out or Path("runs") / f"{Path(told.suite).stem}-entry"
    label = short_name(told.agent)
    if label in told.against:
        raise ValueError(f"enter: expected other agents beside {label}, got {', '.join(told.against)}")
    suite = load_suite(told.suite, out)
    runs = [run for agent in (told.agent, *told.against) for run in runs_of(agent, suite)]
    if told.results is None:
        return Entry(runs, [], out)
    kept = Kept(told.results)
    others = [run for run in [*suite, *runs] if run.label != label]
    found = {run.folder: result for run in others if (result := kept.result(run))}
    folders = sorted({Path(result["folder"]) for result in found.values()})
    return Entry([run for run in runs if run.folder not in found], folders, out)


def runs_of(agent: str, suite: Iterable[RunConfig]) -> list[RunConfig]:
    """An agent's runs under a suite's settings: every environment, budget and seed of it once.

    Where the suite plays the agent under its own name these are its runs. Else the agent has the recipe of the task, if
    there is one for it.

    Raises:
        ValueError: no such agent.
    """
    worlds: dict[str, list[RunConfig]] = defaultdict(list)
    for run in suite:
        same = (run.env, run.env_kwargs, run.budget, run.batch, run.eval_every, run.eval_prompts)
        worlds[json.dumps(same, sort_keys=True)].append(run)
    return [run for world in worlds.values() for run in _in_world(agent, world)]


def _in_world(agent: str, world: Sequence[RunConfig]) -> list[RunConfig]:
    label, seeds = short_name(agent), sorted({run.seed for run in world})
    own = {run.seed: run for run in world if run.label == label}
    if set(own) == set(seeds):
        return [own[seed] for seed in seeds]
    first = world[0]
    settings = recipe_of(first.env, agent, first.env_kwargs)
    mine = dataclasses.replace(first, agent=agent, label=label, overrides=settings)
    check(mine)
    folder = Path(first.folder).parents[1] / label
    return [dataclasses.replace(mine, seed=seed, folder=str(folder / f"seed-{seed}")) for seed in seeds]
