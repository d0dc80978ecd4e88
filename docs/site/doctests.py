"""Tells the API reference that examples in docstrings are code: Griffe knows them in sections called Examples only."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?! *$).*)*", re.MULTILINE)
"""From a prompt to the next empty line."""


def fenced(docstring: str) -> str:
    """A docstring with each of its examples, as deeply indented as it is, between fences."""
    return EXAMPLE.sub(lambda match: f"{match[1]}```pycon\n{match[0]}\n{match[1]}```", docstring)


class Doctests(Extension):
    """Fences the examples of every object."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
