"""Agents by name, found through Python entry points, so that an agent in somebody else's package joins in the same way;
and agents in a file that the user names.

This floor imports no agent: it asks the installed packages which there are (group ``llm_duel_env.agents``).
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import sys
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
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
    """The agent class registered as `name`, or, for ``FILE.py:CLASS``, of that file, which is run.

    Raises:
        UnknownNameError: no installed package registers such an agent.
        ValueError: there is no such file, or no such agent in it.
    """
    if in_file(name):
        return _from_file(name)
    points = _points(AGENTS)
    if name not in points:
        if not points:
            raise UnknownNameError("no agents are registered: install the package first (pip install -e .)")
        raise unknown("agent", name, points)
    return points[name].load()


def agent_points() -> dict[str, EntryPoint]:
    """The entry points of all installed agents by name."""
    return dict(_points(AGENTS))


def in_file(name: str) -> bool:
    """Whether an agent's name is ``FILE.py:CLASS``: a class in a file that the user names.

    >>> in_file("my/agent.py:MyAgent"), in_file("sea")
    (True, False)
    """
    return name.rpartition(":")[0].endswith(".py")


def short_name(name: str) -> str:
    """What an agent is called in tables and folders: its name, or its class where it is in a file.

    >>> short_name("my/agent.py:MyAgent"), short_name("sea")
    ('MyAgent', 'sea')
    """
    return name.rpartition(":")[2] if in_file(name) else name


def _from_file(name: str) -> Any:
    file, _, attribute = name.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"agent {name!r}: expected FILE.py:CLASS, got no file {path}")
    found = getattr(_module(path, path.stat().st_mtime_ns), attribute, None)
    if not isinstance(found, type) or not hasattr(found, "configure"):
        raise ValueError(f"agent {name!r}: expected a class {attribute!r} in {path} that is an Agent, got {found!r}")
    return found


@functools.cache  # one class per file, however often a run asks for it
def _module(path: Path, _changed: int) -> Any:
    spec = importlib.util.spec_from_file_location(f"agent_file_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018  the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and inspect look their module up
    spec.loader.exec_module(module)
    return module


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
