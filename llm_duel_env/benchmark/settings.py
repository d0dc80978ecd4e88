"""Settings as they are typed on the command line."""

from __future__ import annotations

import contextlib
from typing import Any

import yaml


def settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """``("a.b=1e-4", "c=true")`` as names and values; a value is read as YAML, and 1e-4 is a number.

    >>> settings(("policy.learning_rate=1e-4", "opponent=ee", "width=[1, 2]"))
    {'policy.learning_rate': 0.0001, 'opponent': 'ee', 'width': [1, 2]}

    Raises:
        ValueError: a pair without "=".
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"expected KEY=VALUE, got {pair!r}")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"{name}: cannot read the value {value!r}") from None
        if isinstance(found[name], str):
            with contextlib.suppress(ValueError):
                found[name] = float(value)  # YAML takes 1e-4 for text
    return found


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as mappings within mappings.

    >>> nested({"task_kwargs.candidates": 16, "flip_rate": 0.1})
    {'task_kwargs': {'candidates': 16}, 'flip_rate': 0.1}
    """
    found: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        inside = found
        for part in path:
            inside = inside.setdefault(part, {})
        inside[last] = value
    return found
