"""What a run is told, and the answers that can be given before anything is spent."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium

from llm_duel_env.benchmark import registry
from llm_duel_env.benchmark.run_folder import RunFolder, read_object

BY_SEED = "by_seed"
"""In the place of a fold's number: see `env_kwargs_at`."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run's result depends on, and where it goes."""

    agent: str
    """Name of the agent (entry point)."""
    env: str
    """Gymnasium id of the environment."""
    folder: str
    """Where the run's files go."""
    seed: int = 0
    """Seeds prompts, labels and agent."""
    budget: int = 1000
    """Oracle queries that may be bought."""
    batch: int = 32
    """M, prompts per round."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings of the agent's Config that differ from its paper's, by dotted name."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Settings of the environment."""
    label: str = ""
    """Name in tables; the agent's where empty."""
    eval_every: float = 0.02
    """Share of the budget between evaluations, 0.002 to 1. The result keeps at most 101 of them, evenly spread; the
    metrics file keeps all."""
    eval_prompts: int = 512
    """Held-out prompts per evaluation; all of them where there are fewer."""
    checkpoint_every: float = 60.0
    """Seconds between checkpoints."""
    max_stalled_rounds: int = 100
    """The run ends as stalled where so many rounds running together bought fewer queries than one round has prompts: an
    agent whose two responses are nearly always the same text would go on for ever."""
    heartbeat: float = 30.0
    """Seconds between two lines of progress where the output is no terminal."""

    def __post_init__(self) -> None:
        for names, kind, words in (
            (("agent", "env", "label"), str, "a text"),
            (("overrides", "env_kwargs"), Mapping, "a mapping"),
            (("eval_every", "checkpoint_every", "heartbeat"), (int, float), "a number"),
        ):
            for name in names:
                if not isinstance(getattr(self, name), kind):
                    raise ValueError(f"{name}: expected {words}, got {getattr(self, name)!r}")
        if not isinstance(self.env_kwargs.get("task_kwargs") or {}, Mapping):
            raise ValueError(f"env_kwargs: task_kwargs: expected a mapping, got {self.env_kwargs['task_kwargs']!r}")
        for name in ("budget", "batch", "eval_prompts", "max_stalled_rounds"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {getattr(self, name)!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed: expected a whole number of at least 0, got {self.seed!r}")
        if not 0.002 <= self.eval_every <= 1:
            raise ValueError(f"eval_every: expected a share of the budget in [0.002, 1], got {self.eval_every!r}")
        for name in ("checkpoint_every", "heartbeat"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected seconds > 0, got {getattr(self, name)!r}")
        taken = {"budget", "ledger", "num_envs", "scores"} & set(self.env_kwargs)
        if taken:
            raise ValueError(f"env_kwargs: {sorted(taken)} are the runner's to set (budget, batch, folder, agent)")

    @staticmethod
    def read(folder: str | Path) -> RunConfig:
        """The configuration of the run in `folder`.

        Raises:
            ValueError: no run was begun there, or its configuration is damaged or of another version.
        """
        path = RunFolder(folder).config
        if not path.exists():
            raise ValueError(f"there is no run in {folder} ({path} is missing)")
        stored = read_object(path)
        unknown = set(stored) - {f.name for f in dataclasses.fields(RunConfig)}
        if unknown:
            raise ValueError(f"{path}: unknown settings {sorted(unknown)}; was it written by another version?")
        try:
            return RunConfig(**{**stored, "folder": str(folder)})
        except (TypeError, ValueError) as error:  # a setting is missing, or of another type
            raise ValueError(f"{path}: expected a run's configuration: {error}") from None


def check(config: RunConfig) -> None:
    """Answers what can be known to be wrong before anything is built or spent.

    Raises:
        ValueError: an unknown agent or environment, or a setting the agent does not have.
    """
    agent_class = registry.load_agent(config.agent)
    agent_class.configure(config.overrides)
    env_spec(config.env)


def env_spec(env: str) -> Any:
    """The Gymnasium spec of one of our environments.

    Raises:
        UnknownNameError: no such environment; names the nearest.
    """
    import llm_duel_env  # noqa: F401  registers the ids

    with contextlib.suppress(gymnasium.error.Error, ModuleNotFoundError):
        return gymnasium.spec(env)
    raise registry.unknown("environment", env, list_envs())


def env_kwargs_at(env_kwargs: dict[str, Any], seed: int) -> dict[str, Any]:
    """The settings of an environment as the run of this seed has them.

    Where `task_kwargs.fold` is "by_seed" it becomes the seed modulo the number of folds (`task_kwargs.folds`, else 5).
    So ten seeds are two passes over a cross-validation, and the same seed has the same fold whoever plays it.

    >>> env_kwargs_at({"task_kwargs": {"fold": "by_seed"}}, 7)
    {'task_kwargs': {'fold': 2}}
    """
    told = env_kwargs.get("task_kwargs") or {}
    if told.get("fold") != BY_SEED:
        return env_kwargs
    from llm_duel_env.tasks.pool_files import FOLDS

    return {**env_kwargs, "task_kwargs": {**told, "fold": seed % told.get("folds", FOLDS)}}


def task_of(env: str, env_kwargs: dict[str, Any], seed: int = 0) -> Any:
    """An environment's task, made anew, as the run of this seed has it."""
    from llm_duel_env.tasks import make_task

    env_kwargs = env_kwargs_at(env_kwargs, seed)
    task = env_kwargs.get("task", env_spec(env).kwargs["task"])
    return make_task(task, **(env_kwargs.get("task_kwargs") or {}))


def fingerprint_of(env: str, env_kwargs: dict[str, Any]) -> str:
    """The fingerprint of an environment's task as it is now; see `Task.fingerprint`."""
    return task_of(env, env_kwargs).fingerprint()


def list_envs() -> list[str]:
    """Ids of the ``duel/`` environments, sorted."""
    return sorted(name for name in gymnasium.registry if name.startswith("duel/"))
