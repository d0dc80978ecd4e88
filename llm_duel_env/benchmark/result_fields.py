"""The shape of a ``result.json``: type and range of every figure that tables and reports are made of.

Results come from other people and from other versions. A field that is absent is no error here, as earlier versions
wrote fewer; whoever cannot do without one says so (`incomplete`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from llm_duel_env.benchmark.run_folder import read_json

Check = tuple[Callable[[Any], bool], str]
"""Whether a value fits, and in words what is expected."""
LARGEST = 1e100
"""No figure is larger: sums and squares of them stay finite."""
MARKS = ("agent", "env", "curve", "seed")
"""What tells a run's result from other files of its name."""
NEEDED = (
    *("agent", "label", "provenance", "needs", "env", "kind", "env_kwargs", "feedback", "overrides", "seed", "budget"),
    *("batch", "eval_prompts", "status", "curve", "online_win_rate", "cumulative_regret", "seconds"),
)
"""What no table can do without; every version wrote these."""


def is_number(value: Any, low: float = -LARGEST, high: float = LARGEST) -> bool:
    """Whether a value is a number from `low` to `high`, which NaN and infinities are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 0, small enough to be a float too."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _mapping_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _or_null(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _share(value: Any) -> bool:
    return is_number(value, 0, 1)


def _at_least_0(value: Any) -> bool:
    return is_number(value, 0)


def _env_kwargs(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("task_kwargs") or {}, dict)


TEXT: Check = (lambda v: isinstance(v, str), "a text")
COUNT: Check = (is_count, "a count")
MAPPING: Check = (lambda v: isinstance(v, dict), "a mapping")
FIELDS: dict[str, Check] = {
    **dict.fromkeys(("agent", "label", "env", "provenance", "feedback", "status"), TEXT),
    **dict.fromkeys(("fingerprint", "ledger_sha256"), TEXT),
    **dict.fromkeys(("overrides", "env_spec", "agent_config", "agent_source", "versions"), MAPPING),
    **dict.fromkeys(("seed", "budget", "batch", "eval_prompts", "queries", "rounds", "evaluations"), COUNT),
    **dict.fromkeys(("gradient_steps", "sittings"), COUNT),
    **dict.fromkeys(("online_win_rate", "length_controlled_win_rate"), (_or_null(_share), "a share or null")),
    "kind": (lambda v: v in ("finite", "text"), "finite or text"),
    "needs": (lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v), "a list of names"),
    "env_kwargs": (_env_kwargs, "a mapping, with a mapping as task_kwargs where it has them"),
    "generated_tokens": (_or_null(is_count), "a count or null"),
    "cumulative_regret": (_or_null(is_number), "a number or null"),
    "seconds": (_at_least_0, "a number of at least 0"),
    "eval_every": (_share, "a share of the budget"),
    "labels": (_mapping_of(is_count), "a mapping of counts"),
    "oracle": (_mapping_of(_or_null(is_number)), "a mapping of numbers"),
    "time": (_mapping_of(_or_null(_at_least_0)), "a mapping of seconds"),
}
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("believed", "labelled", "true", "accuracy", "calibration_error"), (0, 1)),
    **dict.fromkeys(("spread_tells_error", "doubt_tells_error"), (-1, 1)),
    "spread": (0, LARGEST),
}
"""Of what is found about beliefs; `results.BELIEFS` says what these are."""


def wrong(result: Mapping[str, Any]) -> str:
    """What of a result's fields is of another shape than expected, in words; empty where all that is there fits."""
    for name, (fits, words) in FIELDS.items():
        if name in result and not fits(result[name]):
            return f"{name}: expected {words}, got {str(result[name])[:80]!r}"
    said = ""
    if "curve" in result:
        said = _wrong_series("curve", result["curve"], lambda name: (0, 1) if "win" in name else (-LARGEST, LARGEST))
        said = said or _wrong_interval(result["curve"])
    if not said and result.get("beliefs") is not None:
        said = _wrong_series("beliefs", result["beliefs"], lambda name: RANGES.get(name, (-LARGEST, LARGEST)))
    return said


def _wrong_series(where: str, series: Any, range_of: Callable[[str], tuple[float, float]]) -> str:
    """What is wrong with values over queries; a mapping without any is one of nothing."""
    if not isinstance(series, dict):
        return f"{where}: expected a mapping of lists, got {str(series)[:80]!r}"
    points: Any = series.get("queries")
    if series and not (isinstance(points, list) and points and all(is_number(value, 0) for value in points)):
        return f"{where}: queries: expected a list of counts, got {str(points)[:80]!r}"
    for name, values in series.items():
        if not isinstance(values, list) or len(values) != len(points):
            return f"{where}: {name}: expected {len(points)} values, got {str(values)[:80]}"
        low, high = range_of(name)
        if not all(value is None or is_number(value, low, high) for value in values):
            within = "" if math.isclose(high, LARGEST) else f" from {low} to {high}"
            return f"{where}: {name}: expected numbers{within} or null, got {str(values)[:80]}"
    return ""


def _wrong_interval(curve: Mapping[str, list[Any]]) -> str:
    ends = [[value is None for value in curve[name]] for name in ("win_low", "win_high") if name in curve]
    if len(ends) == 1 or ends[:1] != ends[1:]:
        return "curve: expected win_low and win_high to be known at the same evaluations"
    return ""


def read_result(path: Path) -> dict[str, Any]:
    """The result of a run that is over.

    Raises:
        ValueError: the file is not JSON, holds no result, or one of another shape; names the file.
    """
    found = read_json(path)
    if not isinstance(found, dict) or not {*MARKS, "status"} <= set(found):
        raise ValueError(f"{path}: expected the result of a run, got {str(found)[:80]!r}")
    if said := wrong(found):
        raise ValueError(f"{path}: {said}")
    return found


def is_result(path: Path) -> bool:
    """Whether there is a result at `path` that can be read."""
    try:
        return path.exists() and bool(read_result(path))
    except ValueError:
        return False


def incomplete(results: Iterable[Mapping[str, Any]]) -> str:
    """Which result lacks something of `NEEDED`, in words; empty where none does."""
    for result in results:
        if missing := [name for name in NEEDED if name not in result]:
            return f"{result['folder']}/result.json: expected {', '.join(NEEDED)}, got no {missing[0]}"
    return ""
