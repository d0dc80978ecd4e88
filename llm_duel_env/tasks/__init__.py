"""Tasks by name. Each is imported when first made, so that none needs another's dependencies."""

from __future__ import annotations

import importlib
from typing import Any

from llm_duel_env.tasks.base import Task

TASKS = {
    "synthetic": "llm_duel_env.tasks.synthetic:Synthetic",
    "tiny_tldr": "llm_duel_env.tasks.tiny_tldr:TinyTLDR",
    "text": "llm_duel_env.tasks.text:Text",
    "pool": "llm_duel_env.tasks.pool:Pool",
}
"""Where each task's class stands, as ``module:class``."""


def make_task(name: str, **kwargs: Any) -> Task:
    """The task called `name`, built with `kwargs`.

    Raises:
        ValueError: no task has this name; the known names are listed.
    """
    if name not in TASKS:
        raise ValueError(f"task: expected one of {sorted(TASKS)}, got {name!r}")
    module, _, attribute = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)(**kwargs)
