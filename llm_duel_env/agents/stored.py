"""Candidates in a checkpoint, for agents that need a former round's again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from llm_duel_env.types import Candidates, Observation

FIELDS = ("tokens", "lengths", "from_reference", "reference_log_prob")


def save_candidates(candidates: Candidates, path: Path, **arrays: np.ndarray) -> None:
    """Writes candidates of training prompts, of the prompts their ids only, and arrays that belong to them.

    Args:
        candidates: (M, N).
        path: without its ending: numbers go to ``path.safetensors``, texts to ``path.json``.
        arrays: further arrays, by names that are no field's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = candidates.responses.dtype == object
    known = {name: getattr(candidates, name) for name in FIELDS} | {"prompt_id": candidates.observation["prompt_id"]}
    known["responses"] = None if texts else candidates.responses
    stored = {name: value for name, value in known.items() if value is not None} | arrays
    save_file({name: np.ascontiguousarray(value) for name, value in stored.items()}, _ending(path, "safetensors"))
    rest = {
        "reference_version": candidates.reference_version,
        "responses": candidates.responses.tolist() if texts else None,
    }
    _ending(path, "json").write_text(json.dumps(rest))


def load_candidates(
    path: Path, observe: Callable[[np.ndarray], Observation]
) -> tuple[Candidates, dict[str, np.ndarray]]:
    """What `save_candidates` wrote: the candidates and the further arrays. `observe` says what the prompts are."""
    arrays = load_file(_ending(path, "safetensors"))
    rest = json.loads(_ending(path, "json").read_text())
    observation = observe(arrays.pop("prompt_id"))
    responses = arrays.pop("responses", None)
    if responses is None:
        responses = np.empty((len(rest["responses"]), len(rest["responses"][0])), object)
        responses[:] = rest["responses"]
    known = {name: arrays.pop(name) for name in FIELDS if name in arrays}
    return Candidates(observation, responses, **known, reference_version=rest["reference_version"]), arrays


def _ending(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")
