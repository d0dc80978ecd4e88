"""Tables of constructor arguments, put between marks into pages that people write."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

from llm_duel_env.benchmark.docs.fields import docstrings, written
from llm_duel_env.benchmark.report.table import markdown_table
from llm_duel_env.oracles.http_client import Patience

MARK = "<!-- options of "
BLOCK = re.compile(
    r"(<!-- options of (?P<where>[\w.]+:\w+): made by `make docs` -->\n).*?(<!-- end of options -->)", re.DOTALL
)
"""A mark, what stands between, and the mark of its end."""
GATHERED = {"patience": Patience}
"""Keyword arguments that are gathered (``**patience``): whose fields they are."""


def with_options(page: str) -> str:
    """The page with the table of each class that a mark names, ``module:Class``, between that mark and its end.

    Raises:
        ValueError: a mark has no end, or an argument is not documented.
    """
    begun = page.count(MARK)
    if begun != len(BLOCK.findall(page)):
        raise ValueError(f"expected {begun} blocks of options, each with its end: {BLOCK.pattern}")
    return BLOCK.sub(lambda match: f"{match[1]}\n{_table(match['where'])}\n\n{match[3]}", page)


def _table(where: str) -> str:
    module, _, name = where.partition(":")
    made = getattr(importlib.import_module(module), name)
    return "\n".join(markdown_table(["option", "default", "what it is"], options_of(made), numbers=False))


def options_of(made: Callable[..., Any]) -> list[list[str]]:
    """Name, default and explanation of each argument of a class.

    Explanations are those under ``Args:`` in the docstring of its constructor, or in its own.

    Raises:
        ValueError: an argument that is not explained, or an explanation without an argument.
    """
    constructor = vars(made).get("__init__", made)
    told = args_of(inspect.getdoc(constructor) or "") or args_of(inspect.getdoc(made) or "")
    rows, known = [], set()
    for parameter in inspect.signature(made).parameters.values():
        known.add(parameter.name)
        if parameter.kind is parameter.VAR_KEYWORD and parameter.name in GATHERED:
            rows += _fields(GATHERED[parameter.name])
            continue
        if parameter.name not in told:
            raise ValueError(f"{made.__qualname__}: its argument {parameter.name!r} is not explained under Args")
        default = "required" if parameter.default is parameter.empty else _shown(parameter.default)
        rows.append([f"`{parameter.name}`", default, told[parameter.name]])
    if unknown := sorted(set(told) - known):
        raise ValueError(f"{made.__qualname__}: Args explains {unknown}, which it does not take")
    return rows


def args_of(docstring: str) -> dict[str, str]:
    """Argument -> explanation, as one line, of a docstring as `inspect.getdoc` gives it.

    >>> args_of('''Makes it.
    ...
    ... Args:
    ...     size: how large,
    ...         in bytes.
    ...     **rest: the others.
    ...
    ... Raises:
    ...     ValueError: never.''')
    {'size': 'how large, in bytes.', 'rest': 'the others.'}
    """
    section = re.search(r"^Args:\n((?:[ ].*\n?|\n)+)", docstring, re.MULTILINE)
    told: dict[str, str] = {}
    name = ""
    for line in (section[1] if section else "").splitlines():
        begins = re.match(r" {4}\*{0,2}(\w+): (.*)", line)
        if begins:
            name = begins[1]
            told[name] = begins[2]
        elif line.strip() and name:
            told[name] += " " + line.strip()
    return {name: text.replace("``", "`") for name, text in told.items()}


def _fields(config_class: type) -> list[list[str]]:
    """The rows of a dataclass of settings."""
    told = docstrings(config_class)
    fields = dataclasses.fields(config_class)
    if missing := [field.name for field in fields if field.name not in told]:
        raise ValueError(f"{config_class.__name__}: {missing} have no docstring under them")
    return [[f"`{field.name}`", _shown(field.default), told[field.name]] for field in fields]


def _shown(default: object) -> str:
    """A default as a table has it; a long text has no place in one."""
    if isinstance(default, str) and len(default) > 40:
        return "its own"
    return "`None`" if default is None else f"`{written(default)}`" if default != "" else '`""`'
