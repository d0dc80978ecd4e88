"""Agents by name, found through Python entry points, so that an agent in somebody else's package joins in the same way.

This floor imports no agent: it asks the installed packages which there are (group ``llm_duel_env.agents``).
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

AGENTS = "llm_duel_env.agents"
LOSSES = "llm_duel_env.losses"


class UnknownNameError(ValueError):
    """A name that nothing is known by; the message lists the known ones and the nearest."""


def unknown(what: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """The error for `name`, which is no `what`: suggests the nearest known name and lists them all."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(f"no {what} is called {name!r}.{hint} Known: {', '.join(names) or '(none)'}")


def list_agents() -> list[str]:
    """Names of all agents of the installed packages, sorted."""
    return sorted(_points(AGENTS))


def load_agent(name: str) -> Any:
    """The agent class registered as `name`.

    Raises:
        UnknownNameError: no installed package registers such an agent.
    """
    points = _points(AGENTS)
    if name not in points:
        if not points:
            raise UnknownNameError("no agents are registered: install the package first (pip install -e .)")
        raise unknown("agent", name, points)
    return points[name].load()


def list_losses() -> dict[str, Any]:
    """Direct optimizers of all installed packages by name, sorted: what `llm_duel_env.agents.losses.LOSSES` holds."""
    tables = [point.load() for point in _points(LOSSES).values()]
    losses = {name: loss for table in tables for name, loss in table.items()}
    return {name: losses[name] for name in sorted(losses)}


def _points(group: str) -> dict[str, EntryPoint]:
    return _points_on(group, tuple(sys.path))


@functools.cache  # a suite asks for each of its runs; packages are looked for along sys.path
def _points_on(group: str, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}
