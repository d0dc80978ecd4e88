"""Results of finished runs: found below folders, and the figures that a run is compared by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_duel_env.benchmark import statistics
from llm_duel_env.benchmark.result_fields import MARKS, wrong
from llm_duel_env.benchmark.run_folder import read_json
from llm_duel_env.benchmark.statistics import SEEDS_NEEDED, Interval

COMPARED = ("offline win rate", "curve mean", "online win rate", "queries to target", "cumulative regret")
"""Figures of a run that are compared with the baseline's seed by seed."""
BELIEFS = (
    *("believed", "labelled", "true", "margin", "spread"),
    *("accuracy", "calibration_error", "spread_tells_error", "doubt_tells_error"),
)
"""What is found about an agent's beliefs (`llm_duel_env.benchmark.beliefs`), as a result's "beliefs" name it."""
Curve = tuple[np.ndarray, np.ndarray]
Result = Mapping[str, Any]
"""What `result.json` of a run holds; `find_results` adds where it is, and a replay what it saw ("replay")."""
SELF_REPORTED = "self-reported"
"""An entry that nobody played again."""


def find_results(paths: Iterable[str | Path]) -> tuple[list[Result], list[Path]]:
    """The results below `paths`, and the folders of runs that have none yet.

    Args:
        paths: folders, and archives of `llm-duel submit`, which are checked whole (`submission.read`).

    Raises:
        ValueError: a path does not exist, nothing was found, a result has a figure of another shape than expected, or
            an archive is damaged or altered.
    """
    results: list[Result] = []
    unfinished: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            from llm_duel_env.benchmark.submission import read  # which finds results too

            results += read(path).results
            continue
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder")
        for file in sorted(path.rglob("config.json")):
            if (file.parent / "metrics.jsonl").exists() and not (file.parent / "result.json").exists():
                unfinished.append(file.parent)
        for file in sorted(path.rglob("result.json")):
            result = read_json(file)
            if isinstance(result, dict) and set(MARKS) <= set(result):
                if said := wrong(result):
                    raise ValueError(f"{file}: {said}")
                results.append({**result, "folder": str(file.parent)})
    if not results:
        raise ValueError(f"no result.json below {', '.join(map(str, paths))}: finish a run first")
    return results, unfinished


def curve(result: Result, name: str = "offline_win_rate") -> Curve | None:
    """(queries, values) of one run; None where the task does not know the value."""
    values = result["curve"].get(name)
    if values is None or any(value is None for value in values):
        return None
    return np.asarray(result["curve"]["queries"], float), np.asarray(values, float)


def belief_curve(result: Result, name: str) -> Curve | None:
    """(queries, values) of one run's beliefs; None where it has none, as results of earlier versions."""
    found = result.get("beliefs") or {}
    values = found.get(name)
    if values is None or any(value is None for value in values):
        return None
    return np.asarray(found["queries"], float), np.asarray(values, float)


def bought(result: Result) -> float:
    """Oracle queries that a run has spent."""
    return float(result["curve"]["queries"][-1])


def regret(result: Result) -> float | None:
    """Cumulative regret; None for a run that bought no query, whose sum over nothing says nothing."""
    found: float | None = result["cumulative_regret"]
    return found if bought(result) else None


def kl_curve(result: Result) -> Curve | None:
    """(queries, KL) of one run; None where it is not known, and for a run that bought no query: it is evaluated at its
    start and at its end alone, and what lies between is not seen."""
    return curve(result, "kl") if bought(result) else None


def has_win_rate(result: Result) -> bool:
    """Whether a run knows its offline win rate; on a task without reference responses none does."""
    return curve(result) is not None


def last(result: Result, name: str) -> float | None:
    """The value at the last evaluation of a run."""
    values = result["curve"].get(name)
    return values[-1] if values else None


def win_curve(result: Result) -> Curve:
    """The learning curve: offline win rate.

    Raises:
        ValueError: the run does not know it.
    """
    found = curve(result)
    if found is None:
        raise ValueError(f"{result.get('folder')}: an offline win rate is missing")
    return found


def checked(results: Sequence[Result]) -> str:
    """What a replay (`llm_duel_env.benchmark.rerun`) saw of one entry's runs, in a few words; "self-reported" where
    none was replayed, whatever else is known of them."""
    seen = [result["replay"] for result in results if result.get("replay")]
    if not seen:
        return SELF_REPORTED
    parts = []
    for name in ("rounds", "evaluations"):
        if compared := sum(one[name] for one in seen):
            equal = sum(one[f"{name}_equal"] for one in seen)
            parts.append(f"{compared} {name}" if equal == compared else f"{equal} of {compared} {name} equal")
    verdict = "replayed" if all(one["equal"] for one in seen) else "differs"
    return f"{verdict}: {', '.join([*parts, f'{len(seen)} of {len(results)} seeds'])}"


def reached(result: Result, target: float) -> float | None:
    """Queries at which a run got to `target` and stayed there, of the marks that all runs of its budget and batch are
    read off at; None where it never did. Marks after its last query say nothing of a run that stalled."""
    queries, values = win_curve(result)
    grid = statistics.marks(result["budget"], result["batch"], result.get("eval_every"))
    grid = grid[grid <= queries[-1]]
    return statistics.queries_to_target(grid, np.interp(grid, queries, values), target)


def queries_reached(by_seed: Mapping[int, Result], target: float | None) -> tuple[dict[int, float], int]:
    """Queries to target by seed, the budget for those that never got there, and how many those are."""
    if target is None:
        return {}, 0
    found = {s: reached(r, target) for s, r in by_seed.items()}
    censored = sum(value is None for value in found.values())
    return {s: float(by_seed[s]["budget"]) if value is None else value for s, value in found.items()}, censored


def paired_enough(ours: Mapping[int, Result], theirs: Mapping[int, Result]) -> bool:
    """Whether two agents have as many seeds in common as an interval of what is paired by seed needs."""
    common = set(ours) & set(theirs)
    return bool(common) and len(common) >= SEEDS_NEEDED[ours[min(common)]["kind"]]


def differences_to(
    by_seed: Mapping[int, Result], baseline: Mapping[int, Result], target: float | None
) -> dict[str, Interval]:
    """The paired differences of `COMPARED`, without those that some run does not know; none with too few seeds in
    common."""
    if not paired_enough(by_seed, baseline):
        return {}
    ours, theirs = _compared(by_seed, target), _compared(baseline, target)
    return {
        name: statistics.paired_difference(ours[name], theirs[name])
        for name in COMPARED
        if name in ours and name in theirs
    }


def _compared(by_seed: Mapping[int, Result], target: float | None) -> dict[str, dict[int, float]]:
    """`COMPARED` by seed, for the names that every run knows."""
    curves = {seed: win_curve(result) for seed, result in by_seed.items()}
    found: dict[str, dict[int, float | None]] = {
        "offline win rate": {seed: float(values[-1]) for seed, (_, values) in curves.items()},
        "curve mean": {seed: statistics.area_under(*each) for seed, each in curves.items()},
        "online win rate": {seed: result["online_win_rate"] for seed, result in by_seed.items()},
        "queries to target": {**queries_reached(by_seed, target)[0]},
        "cumulative regret": {seed: regret(result) for seed, result in by_seed.items()},
    }
    known = {}
    for name, values in found.items():
        if values and all(value is not None for value in values.values()):
            known[name] = {seed: float(value) for seed, value in values.items() if value is not None}
    return known
