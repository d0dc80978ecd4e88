"""Oracles by name: what ``kind:name`` stands for in a task's settings."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from llm_duel_env.oracles.base import Oracle

KINDS = {
    "reward_model": ("llm_duel_env.oracles.reward_model:RewardModelOracle", "FOLDER_OR_HUB_NAME"),
    "remote": ("llm_duel_env.oracles.remote:RemoteOracle", "URL"),
    "pairwise": ("llm_duel_env.oracles.pairwise_model:PairwiseModelOracle", "FOLDER_OR_HUB_NAME"),
    "judge": ("llm_duel_env.oracles.judge:JudgeOracle", "MODEL"),
    "human": ("llm_duel_env.oracles.human:HumanOracle", ""),
}
"""Kind -> where its class stands, and what comes after the colon and is its first argument; nothing where empty."""
OF_WEIGHTS = frozenset({"reward_model", "pairwise"})
"""Kinds whose name is a model's folder or hub name."""
GROUP = "llm_duel_env.oracles"
"""Entry points of other packages' oracles: the name is the kind, and what comes after the colon, if anything does, is
the first argument."""


def check_oracle(spec: str | Oracle, kwargs: dict[str, Any] | None) -> None:
    """ValueError where `make_oracle` would refuse what it is given, before anything is loaded."""
    if isinstance(spec, Oracle):
        if kwargs:
            raise ValueError(f"oracle_kwargs go with an oracle's spec, but an oracle was given: {kwargs}")
        return
    kind, _, name = str(spec).partition(":")
    if kind in KINDS:
        wanted = KINDS[kind][1]
        if bool(wanted) != bool(name):
            raise ValueError(f"oracle: expected {f'{kind}:{wanted}' if wanted else kind!r}, got {spec!r}")
    elif not any(point.name == kind for point in entry_points(group=GROUP)):
        known = [f"'{kind}:{wanted}'" if wanted else f"'{kind}'" for kind, (_, wanted) in KINDS.items()]
        raise ValueError(f"oracle: expected {', '.join(known)} or an Oracle, got {spec!r}")


def make_oracle(spec: str | Oracle, kwargs: dict[str, Any] | None = None) -> Oracle:
    """The oracle that a spec names, e.g. ``reward_model:NAME``. An `Oracle` is taken as it is.

    Raises:
        ValueError: an unknown kind, arguments that the oracle does not have, or such for an oracle that exists already.
    """
    check_oracle(spec, kwargs)
    if isinstance(spec, Oracle):
        return spec
    kind, _, name = spec.partition(":")
    if kind in KINDS:
        module, _, attribute = KINDS[kind][0].partition(":")
        made = getattr(importlib.import_module(module), attribute)
    else:
        made = next(point for point in entry_points(group=GROUP) if point.name == kind).load()
    try:
        return made(*([name] if name else []), **(kwargs or {}))
    except TypeError as error:
        raise ValueError(f"oracle {spec!r} with {kwargs}: {error}") from error
