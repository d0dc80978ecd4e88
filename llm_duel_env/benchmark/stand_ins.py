"""What a dry run plays with: the same settings, with tiny models, a few long prompts and an oracle that is free."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from llm_duel_env.benchmark.registry import load_agent
from llm_duel_env.benchmark.run_config import RunConfig, env_kwargs_at, env_spec
from llm_duel_env.benchmark.shapes import WORDS, config_of, write_tiny
from llm_duel_env.oracles.base import Oracle
from llm_duel_env.oracles.catalogue import KINDS, check_oracle
from llm_duel_env.tasks import make_task
from llm_duel_env.tasks.prompt_files import PRESETS, columns, load_rows, read_prompts
from llm_duel_env.tasks.text import PLAIN, Text
from llm_duel_env.types import Observation

PROMPTS = 8
"""Prompts of a round, at most."""
TRAIN, HELDOUT = 10, 2
"""Prompts in the files."""
LEARNING_RATE = 1e-2
LOCAL_ROWS = 100
"""Rows of the user's own files that are read, to see that they can be."""

Shapes = dict[str, dict[str, Any]]


class StandIn(Oracle):
    """An oracle that says something of its own, and costs nothing."""

    def __init__(self, like: type[Oracle]) -> None:
        self.has_utility, self.metered = bool(like.has_utility), like.metered is True

    def utility(self, prompts: Observation, responses: np.ndarray) -> np.ndarray:
        """A number made of each text."""
        return np.array([zlib.crc32(str(response).encode()) / 2**32 for response in responses], np.float64)

    def win_probability(self, prompts: Observation, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Of the difference of the two numbers."""
        return expit(self.utility(prompts, first) - self.utility(prompts, second))


def stand_ins(config: RunConfig, shapes: Shapes, folder: Path) -> tuple[RunConfig, list[str]]:
    """The run to play, and what was put in place of what, as lines to tell.

    Args:
        config: the real run.
        shapes: of models that are not at hand; see `shapes.config_of`.
        folder: where files are written.

    Raises:
        ValueError: a model's configuration is not to be had, or a setting of the task or the oracle is wrong.
    """
    notes: list[str] = []
    env_kwargs = dict(env_kwargs_at(config.env_kwargs, config.seed))
    name = env_kwargs.get("task", env_spec(config.env).kwargs["task"])
    task_kwargs = dict(env_kwargs.pop("task_kwargs", None) or {})
    if name == "text":
        task_kwargs = _text(task_kwargs, shapes, folder, notes)
        _oracle(task_kwargs, shapes, folder, notes)
    try:
        task = make_task(name, **task_kwargs)
    except TypeError as error:
        raise ValueError(f"{config.env} with {task_kwargs}: {error}") from error
    batch = min(config.batch, PROMPTS)
    overrides = {**config.overrides, **_agent(config, shapes, folder, notes)}
    small = dataclasses.replace(
        config,
        folder=str(folder / "run"),
        batch=batch,
        budget=4 * batch,
        overrides=overrides,
        env_kwargs={**env_kwargs, "task": task},
        eval_every=1.0,
        eval_prompts=min(config.eval_prompts, HELDOUT),
    )
    return small, notes


def _text(kwargs: dict[str, Any], shapes: Shapes, folder: Path, notes: list[str]) -> dict[str, Any]:
    """A text task's arguments with a tiny policy and files of prompts that are too long."""
    for name in ("model", "oracle"):
        if not isinstance(kwargs.get(name), str):
            raise ValueError(f"task_kwargs: expected {name}, a text, got {kwargs.get(name)!r}")
    known = inspect.signature(Text).parameters
    strange = sorted(set(kwargs) - set(known))
    if strange:
        raise ValueError(f"task_kwargs: expected some of {', '.join(known)}, got {', '.join(strange)}")
    preset = kwargs.get("preset")
    plain = {name: kwargs.get(name, default) for name, default in PLAIN.items()}
    limit = int(kwargs.get("max_prompt_tokens", known["max_prompt_tokens"].default))
    _read_own(kwargs, plain)
    new = {**kwargs, "model": write_tiny(config_of(kwargs["model"], shapes), folder / "policy")}
    notes.append(f"a tiny random model stands in for {kwargs['model']}")
    new["prompts"] = str(folder / "prompts.jsonl")
    rows = [_row(preset, plain, _words(number, limit)) for number in range(TRAIN + HELDOUT)]
    held = rows[TRAIN:]
    _write(folder / "prompts.jsonl", rows)
    if isinstance(kwargs.get("heldout"), str):
        new["heldout"] = str(folder / "heldout.jsonl")
        _write(folder / "heldout.jsonl", held)
    else:
        new["heldout"] = HELDOUT
    if kwargs.get("references") is not None:
        new["references"] = str(folder / "references.jsonl")
        read = PRESETS[preset].read if preset in PRESETS else _plain_reader(plain)
        made = read_prompts(rows, read, "prompts")
        _write(folder / "references.jsonl", [{"prompt": row.prompt, "reference": "ab cd"} for row in made])
    new["limit"] = None
    return new


def _plain_reader(plain: dict[str, Any]) -> Any:
    references = [plain["reference_column"]] if plain["reference_column"] else []
    return columns(plain["prompt_column"], references, plain["template"], plain["responses_column"])


def _read_own(kwargs: dict[str, Any], plain: dict[str, Any]) -> None:
    """Reads the first rows of the user's own files, so that a malformed one is told of now."""
    preset = kwargs.get("preset")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {preset!r}")
    read = PRESETS[preset].read if preset is not None else _plain_reader(plain)
    stored = columns("prompt", ["reference"])
    for name, how in (("prompts", read), ("heldout", read), ("references", stored)):
        source = kwargs.get(name)
        if isinstance(source, str) and (Path(source).expanduser().is_file() or source.count("/") != 1):
            read_prompts(load_rows(source, "train"), how, source, LOCAL_ROWS)


def _words(number: int, count: int) -> str:
    return " ".join(WORDS[(number * 131 + k * 17 + k * k) % len(WORDS)] for k in range(count))


def _row(preset: str | None, plain: dict[str, Any], prompt: str) -> dict[str, Any]:
    """A row in the preset's schema, or in the columns that are named."""
    good, bad = "ab cd ef", "gh ij"
    if preset == "tldr":
        return {"prompt": prompt, "label": good}
    if preset == "ultrafeedback":
        return {"prompt": prompt, "chosen": [{"role": "assistant", "content": good}],
                "rejected": [{"role": "assistant", "content": bad}]}  # fmt: skip
    if preset == "hh_rlhf":
        head = f"\n\nHuman: {prompt}\n\nAssistant: "
        return {"chosen": head + good, "rejected": head + bad}
    if preset == "shp2":
        return {"history": prompt, "human_ref_A": good, "human_ref_B": bad, "labels": 1}
    row = {plain["prompt_column"]: prompt, plain["responses_column"]: [good, bad]}
    return row | ({plain["reference_column"]: good} if plain["reference_column"] else {})


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _oracle(kwargs: dict[str, Any], shapes: Shapes, folder: Path, notes: list[str]) -> None:
    """Puts a tiny reward model, or a `StandIn`, in the place of an oracle that a spec names; in place."""
    spec = kwargs["oracle"]
    kind, _, name = spec.partition(":")
    own = kwargs.get("oracle_kwargs") or {}
    check_oracle(spec, own)
    if kind == "reward_model":
        kwargs["oracle"] = f"reward_model:{write_tiny(config_of(name, shapes), folder / 'oracle', scores=True, seed=1)}"
        kwargs["oracle_kwargs"] = {key: value for key, value in own.items() if key not in ("device", "dtype")}
        notes.append(f"a tiny random reward model stands in for {name}")
        return
    made: Any = Oracle
    if kind in KINDS:
        module, _, attribute = KINDS[kind][0].partition(":")
        made = getattr(importlib.import_module(module), attribute)
        try:
            inspect.signature(made).bind(*([name] if name else []), **own)
        except TypeError as error:
            raise ValueError(f"oracle {spec!r} with {own}: {error}") from None
    kwargs["oracle"] = StandIn(made)
    kwargs.pop("oracle_kwargs", None)
    notes.append(f"the oracle {spec} is neither loaded nor asked: made-up answers stand in for it")


def _agent(config: RunConfig, shapes: Shapes, folder: Path, notes: list[str]) -> dict[str, Any]:
    """Settings of the agent that differ: what is not installed, an encoder that is not at hand, a slow start."""
    told = load_agent(config.agent).configure(config.overrides)
    policy = told.policy
    changed: dict[str, Any] = {}
    for package, setting in (("vllm", "sampler"), ("deepspeed", "learner")):
        if getattr(policy, setting) == package and find_spec(package) is None:
            changed[f"policy.{setting}"] = "torch"
            notes.append(f"{package} is not installed here: policy.{setting}=torch stands in for it")
    if "policy.learner" in changed:
        changed["policy.deepspeed_config"] = None
    if changed.get("policy.learner", policy.learner) == "torch":
        # So that two steps show in the answers, which are compared when the run has been saved and loaded.
        changed["policy.learning_rate"] = max(policy.learning_rate, LEARNING_RATE)
    if policy.encoder not in ("policy", "task"):
        changed["policy.encoder"] = write_tiny(config_of(policy.encoder, shapes), folder / "encoder", seed=2)
        notes.append(f"a tiny random model stands in for the encoder {policy.encoder}")
    if hasattr(told, "reward_model") and hasattr(told.reward_model, "start"):
        changed["reward_model.start"] = 1  # so that the ensemble learns in the first round
    if hasattr(told, "burn_in"):
        changed["burn_in"] = 0.0
    return changed
