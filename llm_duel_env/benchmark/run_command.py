"""What `llm-duel run` is told, as the configuration of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llm_duel_env.benchmark.launcher import speaks
from llm_duel_env.benchmark.recipes import difference, recipe_of
from llm_duel_env.benchmark.registry import in_file, load_agent, short_name
from llm_duel_env.benchmark.run_config import RunConfig, check, env_spec
from llm_duel_env.benchmark.run_file import RunFile, read
from llm_duel_env.benchmark.settings import merged, nested, settings
from llm_duel_env.options import Pairs, Run

GIVEN = ("seed", "budget", "batch", "eval_every", "eval_prompts", "checkpoint_every")
"""Options of a run that are fields of its `RunConfig` as they are."""


def words(told: Run) -> list[str]:
    """The command's words but --ranks: what each rank is started with."""
    found = ["run"]
    for field in dataclasses.fields(told):
        value, option = getattr(told, field.name), f"--{field.name.replace('_', '-')}"
        if field.name in ("set", "env_set"):
            for pairs in value:
                found += [option, *pairs]
        elif field.name == "recipe":
            found += [] if value else ["--no-recipe"]
        elif field.name not in ("ranks", "dry_run") and value is not None:
            found += [option, str(value)]
    return found


def file_of(told: Run) -> RunFile:
    """What --config says; nothing without it."""
    return read(told.config) if told.config is not None else RunFile()


def fresh(told: Run) -> RunConfig:
    """The run that options, over a file, over the task's recipe, describe. Says what differs from the paper's defaults.

    Raises:
        ValueError: no agent or environment, or a setting that is unknown or of the wrong type.
    """
    file = file_of(told).settings
    agent, env = told.agent or file.get("agent"), told.env or file.get("env")
    if not agent or not env:
        raise ValueError("run: expected --agent and --env (or --resume FOLDER, or a --config that says them)")
    agent_class = load_agent(agent)
    env_spec(env)
    env_kwargs = merged(file.get("env_kwargs", {}), nested(_settings(told.env_set)))
    recipe = recipe_of(env, agent, env_kwargs) if told.recipe and file.get("recipe", True) else {}
    given = {name: file[name] for name in GIVEN if name in file} | _given(told)
    folder = told.folder or file.get("folder")
    folder = folder or Path("runs") / env.rsplit("/", 1)[-1] / short_name(agent) / f"seed-{given.get('seed', 0)}"
    config = RunConfig(
        agent=agent,
        env=env,
        folder=str(folder),
        overrides={**recipe, **file.get("overrides", {}), **_settings(told.set)},
        env_kwargs=env_kwargs,
        label=short_name(agent) if in_file(agent) else "",
        **given,
    )
    check(config)
    changed = difference(agent_class.configure(config.overrides), agent_class.configure({}))
    if not speaks():
        return config
    for name, (was, now) in changed.items():
        print(f"{name} = {now} (paper's default: {was})")
    return config


def resumed(told: Run) -> RunConfig:
    """The run in a folder, with what else is told, which must agree with it.

    Raises:
        ValueError: there is no run, or an option that does not go with --resume.
    """
    assert told.resume is not None
    if told.folder is not None:
        raise ValueError("run: --resume names the folder; leave --folder out")
    if told.config is not None:
        raise ValueError("run: --resume goes on with the settings that the run has; leave --config out")
    if not told.recipe:
        raise ValueError("run: --resume goes on with the settings that the run has; leave --no-recipe out")
    stored = RunConfig.read(told.resume)
    given: dict[str, Any] = {name: value for name in ("agent", "env") if (value := getattr(told, name)) is not None}
    if told.set:
        given["overrides"] = {**stored.overrides, **_settings(told.set)}
    if told.env_set:
        given["env_kwargs"] = merged(stored.env_kwargs, nested(_settings(told.env_set)))
    return dataclasses.replace(stored, **given, **_given(told))


def _settings(pairs: Pairs) -> dict[str, Any]:
    return settings([pair for together in pairs for pair in together])


def _given(told: Run) -> dict[str, Any]:
    return {name: value for name in GIVEN if (value := getattr(told, name)) is not None}
