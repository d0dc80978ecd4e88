"""Actions: what an environment takes, checked before anything is shown or spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from gymnasium import spaces

from llm_duel_env.spaces import is_utf8

_NAMES = {"first", "second", "query", "again"}


def action_space(response_space: spaces.Space) -> spaces.Dict:
    """The space of one duel: ``first``, ``second`` and ``query``. An action may also say ``again``; a space knows no
    entries that may be left out, so it is not in it, and random actions keep no prompts."""
    return spaces.Dict(first=deepcopy(response_space), second=deepcopy(response_space), query=spaces.Discrete(2))


def parse_action(action: Any, space: spaces.Space, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The action of `count` duels as arrays: first (M,), second (M,), query (M,) bool; `parse_again` has the rest.

    Args:
        action: ``first`` and ``second``, M responses each, and ``query``, M of 0 or 1; all 1 where it is left out.
        space: Space of one response, Discrete(K) or Utf8Text.
        count: M.

    Returns:
        Responses as int64, or as str in an array of dtype object.

    Raises:
        TypeError: not a mapping, or a value of the wrong type.
        ValueError: missing or unknown keys, a wrong length, or a value out of range.
    """
    wanted = "expected an action {'first': M responses, 'second': M responses, 'query': M of 0 or 1}"
    if not isinstance(action, Mapping):
        raise TypeError(f"{wanted}, got {type(action).__name__}: {_short(action)} (a list of pairs is not an action)")
    names = set(action)
    if not {"first", "second"} <= names <= _NAMES:
        raise ValueError(f"{wanted}, got keys {sorted(map(str, names))}")
    query = action.get("query", np.ones(count, np.int64))
    parse = _indices if isinstance(space, spaces.Discrete) else _texts
    first, second = (parse(name, action[name], space, count) for name in ("first", "second"))
    return first, second, _integers("query", query, count, 0, 1).astype(bool)


def parse_again(action: Mapping[str, Any], count: int) -> np.ndarray:
    """Which of the M prompts the action keeps for the next round, (M,) bool: none where ``again`` is left out."""
    return _integers("again", action.get("again", np.zeros(count, np.int64)), count, 0, 1).astype(bool)


def parse_single_action(action: Any, space: spaces.Space) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `parse_action`, for the action of one duel, whose values are not in sequences."""
    if isinstance(action, Mapping):
        action = {name: [value] for name, value in action.items()}
    return parse_action(action, space, 1)


def _indices(name: str, values: Any, space: Any, count: int) -> np.ndarray:
    return _integers(name, values, count, int(space.start), int(space.start + space.n) - 1)


def _integers(name: str, values: Any, count: int, low: int, high: int) -> np.ndarray:
    _check_length(name, values, count)
    for number, value in enumerate(values):
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value[()]
        if not isinstance(value, (int, np.integer, np.bool_)):
            raise TypeError(f"{name}[{number}]: expected an integer, got {type(value).__name__}: {_short(value)}")
        if not low <= value <= high:
            raise ValueError(f"{name}[{number}]: expected {low} to {high}, got {value}")
    return np.array([int(value) for value in values], np.int64)


def _texts(name: str, values: Any, space: Any, count: int) -> np.ndarray:
    _check_length(name, values, count)
    for number, value in enumerate(values):
        where = f"{name}[{number}]"
        if not isinstance(value, str):
            raise TypeError(f"{where}: expected a str, got {type(value).__name__}: {_short(value)}")
        if not space.min_length <= len(value) <= space.max_length:
            wanted = f"{space.min_length} to {space.max_length} characters"
            raise ValueError(f"{where}: expected {wanted}, got {len(value)}: {_short(value)}")
        if not is_utf8(value):
            raise ValueError(f"{where}: expected text without lone surrogates, got {_short(value)}")
    texts = np.empty(count, object)
    texts[:] = [str(value) for value in values]
    return texts


def _check_length(name: str, values: Any, count: int) -> None:
    # A str is a sequence too, but of characters, and never what was meant.
    array = isinstance(values, np.ndarray) and values.ndim > 0
    if not array and (isinstance(values, (str, bytes)) or not isinstance(values, Sequence)):
        raise TypeError(f"{name}: expected a sequence of {count}, got {type(values).__name__}: {_short(values)}")
    if len(values) != count:
        raise ValueError(f"{name}: expected {count} values, one per prompt, got {len(values)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
