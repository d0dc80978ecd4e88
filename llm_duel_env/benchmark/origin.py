"""Where a result comes from, as far as a reader needs it to play the run again: part of every ``result.json``."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from llm_duel_env.benchmark import registry
from llm_duel_env.benchmark.run_config import RunConfig, env_kwargs_at, env_spec
from llm_duel_env.benchmark.run_folder import RunFolder, finite, read_json


def origin(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """Of a run: the environment's spec, the agent's settings and source, and what it was played on.

    env_spec: what Gymnasium makes the environment of. agent_config: every setting, defaults included, as it was then.
    agent_source: see `source_of`. eval_every: as told. versions: packages, code and machine when the run began.
    sittings: how often it was begun or gone on with, where that is known.
    """
    agent_class = registry.load_agent(config.agent)
    settings = dataclasses.asdict(agent_class.configure(config.overrides))
    found: dict[str, Any] = {
        "env_spec": spec_of(config),
        # A setting that JSON does not know must not cost a run its result.
        "agent_config": json.loads(json.dumps(finite(settings), default=repr)),
        "agent_source": source_of(config.agent, agent_class),
        "eval_every": config.eval_every,
    }
    stored, commands = folder.path / "versions.json", folder.path / "command.txt"
    if stored.exists():
        found["versions"] = {name: value for name, value in read_json(stored).items() if name != "fingerprint"}
    if commands.exists():
        found["sittings"] = commands.read_text().count("\n")
    return found


def spec_of(config: RunConfig) -> dict[str, Any]:
    """The environment's `gymnasium.envs.registration.EnvSpec`, the run's settings among its arguments, as plain data
    without what is default: ``EnvSpec.from_json(json.dumps(...))`` is what `gymnasium.make` and `make_vec` take."""
    spec = copy.deepcopy(env_spec(config.env))
    spec.kwargs = {**spec.kwargs, "budget": config.budget, **env_kwargs_at(config.env_kwargs, config.seed)}
    told = json.loads(spec.to_json())
    return {name: value for name, value in told.items() if value not in (None, False, True)}


def source_of(name: str, agent_class: Any) -> dict[str, Any]:
    """Which agent it was: class (``module:name``), package with its version, and the SHA-256 of its file; without what
    cannot be told."""
    found: dict[str, Any] = {"class": f"{agent_class.__module__}:{agent_class.__qualname__}"}
    point = registry.agent_points().get(name)
    if point is not None and point.dist is not None:
        found["package"] = f"{point.dist.name} {point.dist.version}"
    with contextlib.suppress(OSError, TypeError):
        if file := inspect.getsourcefile(agent_class):
            found["sha256"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found
