"""Settings as they are typed on the command line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import yaml


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """``("a.b=1e-4", "c=true")`` as names and values; a value is read as JSON, or else as YAML.

    >>> settings(("policy.learning_rate=1e-4", "opponent=ee", "width=[1, 2]"))
    {'policy.learning_rate': 0.0001, 'opponent': 'ee', 'width': [1, 2]}

    Raises:
        ValueError: a pair without "=", or a name that is there twice.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"expected KEY=VALUE, got {pair!r}")
        if name in found:
            raise ValueError(f"{name} is given twice: {found[name]!r} and {value}")
        found[name] = _value(name, value)
    return found


def _value(name: str, typed: str) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(typed)
    try:
        value = yaml.safe_load(typed)
    except yaml.YAMLError:
        raise ValueError(f"{name}: cannot read the value {typed!r}") from None
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(typed)  # YAML takes 1.e-4 for text
    return value


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as mappings within mappings.

    >>> nested({"task_kwargs.candidates": 16, "flip_rate": 0.1})
    {'task_kwargs': {'candidates': 16}, 'flip_rate': 0.1}

    Raises:
        ValueError: a name that has both a value and names within it.
    """
    found: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        inside = found
        for part in path:
            inside = inside.setdefault(part, {})
            if not isinstance(inside, dict):
                raise ValueError(f"{name}={value}: {part} is given the value {inside!r} too; leave one of them out")
        if last in inside:
            raise ValueError(f"{name}={value}: it is given the value {inside[last]!r} too; leave one of them out")
        inside[last] = value
    return found


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with what `new` says otherwise, within mappings too; neither is changed.

    >>> merged({"task_kwargs": {"candidates": 6, "seed": 1}}, {"task_kwargs": {"candidates": 16}, "flip_rate": 0.1})
    {'task_kwargs': {'candidates': 16, 'seed': 1}, 'flip_rate': 0.1}
    """
    both = {name: (old.get(name), value) for name, value in new.items()}
    inside = {n: merged(a, b) for n, (a, b) in both.items() if isinstance(a, dict) and isinstance(b, dict)}
    return {**old, **new, **inside}


def typed(values: dict[str, Any]) -> list[str]:
    """Settings as they would be typed: what `settings` reads back.

    >>> typed({"policy.learning_rate": 5e-07, "opponent": "ee", "task_kwargs": {"candidates": 16}})
    ['policy.learning_rate=5e-07', 'opponent="ee"', 'task_kwargs={"candidates": 16}']
    """
    return [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
