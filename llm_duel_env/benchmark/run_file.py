"""A run's settings as a YAML file: what `llm-duel run --config FILE` reads.

agent: sea                          # and: seed, budget, batch, eval_every, eval_prompts, checkpoint_every, folder
env: duel/Text-v0
env_kwargs: {task_kwargs: {...}}    # what --env-set gives
overrides: {policy.batch: 128}      # what --set gives; policy: {batch: 128} says the same
recipe: true                        # false is --no-recipe
shapes: {NAME: {model_type: ...}}   # for --dry-run: configurations of models that are not at hand
gpu_memory: 80                      # for --dry-run: GiB of each GPU
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llm_duel_env.benchmark.registry import load_agent, unknown

SETTINGS: dict[str, tuple[tuple[type, ...], str]] = {
    "agent": ((str,), "the name of an agent"),
    "env": ((str,), "the name of an environment"),
    "env_kwargs": ((dict,), "settings by name"),
    "overrides": ((dict,), "settings by name"),
    "seed": ((int,), "a whole number"),
    "budget": ((int,), "a whole number"),
    "batch": ((int,), "a whole number"),
    "eval_every": ((int, float), "a number"),
    "eval_prompts": ((int,), "a whole number"),
    "checkpoint_every": ((int, float), "a number"),
    "folder": ((str,), "a folder"),
    "recipe": ((bool,), "true or false"),
    "shapes": ((dict,), "the fields of configurations by the models' names"),
    "gpu_memory": ((int, float), "GiB of each GPU, a positive number"),
}
"""What a file may say -> of which types, in words."""
FOR_DRY_RUN = ("shapes", "gpu_memory")


@dataclass(frozen=True)
class RunFile:
    """What a file says."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Of the run, by the names of `SETTINGS`; overrides by dotted name."""
    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Fields of models' configurations by the models' names."""
    gpu_memory: float | None = None
    """GiB of each GPU."""


def read(path: Path) -> RunFile:
    """Reads a file.

    Raises:
        ValueError: no such file, no YAML, or an unknown name or a wrong type in it; says what was expected.
    """
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: expected a YAML file, got {str(path)!r} ({error})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: expected YAML, got something else: {error}") from None
    try:
        return parse(told)
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None


def parse(told: Any) -> RunFile:
    """Checks what a file says: the YAML's content.

    Raises:
        ValueError: see `read`.
    """
    if not isinstance(told, dict):
        raise ValueError(f"expected settings by name, got {told!r:.80}")
    for name, value in told.items():
        if name not in SETTINGS:
            raise unknown("setting of a run", str(name), SETTINGS)
        kinds, words = SETTINGS[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{name}: expected {words}, got {value!r}")
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            raise ValueError(f"{name}: expected names that are texts, got {list(value)}")
    memory = told.get("gpu_memory")
    if memory is not None and not memory > 0:
        raise ValueError(f"gpu_memory: expected {SETTINGS['gpu_memory'][1]}, got {memory!r}")
    shapes = told.get("shapes", {})
    for name, fields in shapes.items():
        if not isinstance(fields, dict):
            raise ValueError(f"shapes: {name}: expected the fields of its configuration by name, got {fields!r}")
    settings = {name: value for name, value in told.items() if name not in FOR_DRY_RUN}
    if "overrides" in settings:
        if "agent" not in settings:
            raise ValueError("overrides: expected an agent beside them, whose settings they are")
        settings["overrides"] = dotted(settings["overrides"], load_agent(settings["agent"]).configure({}))
    return RunFile(settings, shapes, memory)


def dotted(told: dict[str, Any], default: Any) -> dict[str, Any]:
    """Settings with dotted names in place of mappings within mappings, where `default`, a config, has parts.

    Raises:
        ValueError: a setting is given twice.
    """
    found: dict[str, Any] = {}
    for name, value in told.items():
        part = getattr(default, name, None)
        if isinstance(value, dict) and dataclasses.is_dataclass(part):
            inside = {f"{name}.{key}": one for key, one in dotted(value, part).items()}
        else:
            inside = {name: value}
        for key, one in inside.items():
            if key in found:
                raise ValueError(f"overrides: {key} is given twice: {found[key]!r} and {one!r}")
            found[key] = one
    return found
