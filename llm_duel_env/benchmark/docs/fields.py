"""The fields of a config dataclass, with the docstrings under them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Field:
    """One setting."""

    name: str
    """As it is typed after ``--set``: dotted where it is a part's."""
    default: Any
    told: str
    """The docstring under it, as one line."""


def fields_of(config: Any, prefix: str = "") -> list[Field]:
    """All settings of a config instance whose values are the defaults; those of parts (policy, ...) follow its own.

    Raises:
        ValueError: a field has no docstring.
    """
    told = docstrings(type(config))
    own, parts = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            parts += fields_of(value, f"{prefix}{field.name}.")
        elif field.name not in told:
            raise ValueError(f"{type(config).__name__}.{field.name} has no docstring under it")
        else:
            own.append(Field(prefix + field.name, value, told[field.name]))
    return own + parts


def docstrings(config_class: type) -> dict[str, str]:
    """Field name -> the docstring under it, a class's own before that of the class it extends."""
    found: dict[str, str] = {}
    for owner in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(owner):
            found |= _own_docstrings(owner)
    return found


def value_of(config: Any, name: str) -> Any:
    """The value of a dotted setting."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def written(value: Any) -> str:
    """A value as YAML and the command line have it.

    >>> written(5e-07), written(True), written((0.9, 0.95)), written({"n_steps": 2}), written({})
    ('5e-7', 'true', '[0.9, 0.95]', '{n_steps: 2}', '{}')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        number, e, exponent = f"{value:g}".partition("e")
        return f"{number}e{int(exponent)}" if e else number
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {written(item)}' for name, item in value.items())}}}"
    return str(value)


def _own_docstrings(owner: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement, after in zip(body.body, body.body[1:]):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[statement.target.id] = " ".join(after.value.value.split())
    return found
