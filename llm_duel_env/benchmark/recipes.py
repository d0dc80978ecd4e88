"""Recipes: tuned settings of (task, agent), as data. Defaults in an agent's Config are its paper's; a recipe says what
was changed for a task, and the runner prints it."""

from __future__ import annotations

import copy
import functools
from importlib import resources
from typing import Any

import yaml


def recipe_name(env: str, env_kwargs: dict[str, Any] | None = None) -> str:
    """The recipe file of an environment: the task it plays, in snake case.

    >>> recipe_name("duel/TinyTLDR-v0"), recipe_name("duel/Synthetic-v0")
    ('tiny_tldr', 'synthetic')
    >>> recipe_name("duel/Synthetic-v0", {"task": "tiny_tldr"})
    'tiny_tldr'
    """
    if env_kwargs and "task" in env_kwargs:
        return str(env_kwargs["task"])
    name = env.rsplit("/", 1)[-1].rsplit("-v", 1)[0]
    words = "".join(f"_{c}" if c.isupper() and i and not name[i - 1].isupper() else c for i, c in enumerate(name))
    return words.lower()


def recipe_of(
    env: str, agent: str, env_kwargs: dict[str, Any] | None = None, name: str | None = None
) -> dict[str, Any]:
    """Overrides (dotted names) for `agent` on the task of `env`; empty where nobody has tuned it.

    Args:
        env: id of the environment.
        agent: its name, or ``AGENT+VARIANT`` for what was tuned for a variant of a suite.
        env_kwargs: settings of the environment.
        name: of another recipe than the task's own, tuned at another budget, say.

    Raises:
        ValueError: there is no recipe of this `name`, or the file is not a mapping from agents to mappings.
    """
    if name is not None and not _file(name).is_file():
        raise ValueError(f"recipe: expected one of {_names()}, got {name!r}")
    name = recipe_name(env, env_kwargs) if name is None else name
    table = _table(name)
    recipe = table.get(agent, {}) if isinstance(table, dict) else None
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe {name}.yaml: expected a mapping from agents to their settings, got {recipe!r}")
    return copy.deepcopy(recipe)


@functools.cache  # a suite asks for each of its runs
def _table(name: str) -> Any:
    file = _file(name)
    return (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}


def _file(name: str) -> Any:
    return resources.files("llm_duel_env") / "recipes" / f"{name}.yaml"


def _names() -> list[str]:
    folder = resources.files("llm_duel_env") / "recipes"
    return sorted(f.name[: -len(".yaml")] for f in folder.iterdir() if f.name.endswith(".yaml"))


def difference(config: Any, default: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields of two config dataclasses of one class that differ: dotted name -> (default, value)."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in default.__dataclass_fields__:
        was, now = getattr(default, name), getattr(config, name)
        if hasattr(was, "__dataclass_fields__"):
            found |= difference(now, was, f"{prefix}{name}.")
        elif was != now:
            found[prefix + name] = (was, now)
    return found
