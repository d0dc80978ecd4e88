"""Sample duels: at every evaluation mark a few duels of the last round, written down for people to read.

One JSON object per line of ``samples.jsonl``, the fields of `Sample`. Which duels are kept does not depend on their
outcome: the first of each kind (labelled by the oracle, labelled by the agent itself, left out), then more of the
first kind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_duel_env.benchmark.run_folder import read_metrics
from llm_duel_env.tasks.base import Task
from llm_duel_env.types import Duels

PER_MARK = 3
"""Duels written at each evaluation mark."""
LONGEST = 2000
"""Characters of a text that are kept."""
SHOWN_NUMBERS = 4
"""Numbers of a vector that stand for it."""


@dataclass(frozen=True)
class Sample:
    """One duel: what was shown, who judged it, and what the agent said of it."""

    round: int
    queries: int
    """Queries paid when the round was over."""
    prompt_id: int
    prompt: str
    first: str
    second: str
    labelled_by: str
    """oracle, agent (a synthetic label, which costs nothing), or nobody."""
    first_wins: float | None
    """1 the first won, 0 the second won, 1/2 a tie; None where nobody labelled it."""
    same: bool
    """The agent showed one response twice: a tie by definition, and not paid for."""
    reason: str
    """Why the agent chose the pair, in its own words; empty where it tells nothing."""
    belief: float | None
    """The agent's own P(first beats second) before the label; None where it has none."""
    spread: float | None
    """Standard deviation of that probability over the members of its ensemble."""
    oracle_probability: float | None
    """The oracle's P(first beats second). The agent was never told."""
    utility_first: float | None
    """True utility, where the task knows it. The agent was never told."""
    utility_second: float | None


def samples(task: Task, duels: Duels, info: dict[str, Any], *, round: int, queries: int) -> list[Sample]:
    """The duels of one round that are kept, `PER_MARK` at most.

    Args:
        task: whose texts are shown.
        duels: the M duels.
        info: what the vector environment said of them.
        round: rounds played.
        queries: queries paid.
    """
    preference = np.asarray(info["preference"], float)
    labels = np.where(np.isnan(preference), duels.synthetic, preference)
    by = np.where(~np.isnan(preference), "oracle", np.where(np.isnan(labels), "nobody", "agent"))
    rows = kept(by)
    notes, told = duels.notes, texts(task, duels, rows)
    return [
        Sample(
            round=round,
            queries=queries,
            prompt_id=int(duels.pair.observation["prompt_id"][row]),
            prompt=cut(prompt),
            first=cut(first),
            second=cut(second),
            labelled_by=str(by[row]),
            first_wins=_number(labels[row]),
            same=bool(duels.pair.responses[row, 0] == duels.pair.responses[row, 1]),
            reason=cut(notes.reason[row]) if notes else "",
            belief=_number(notes.belief[row]) if notes and notes.belief is not None else None,
            spread=_number(notes.spread[row]) if notes and notes.spread is not None else None,
            oracle_probability=_told(info, "metrics/probability", row),
            utility_first=_told(info, "metrics/utility_first", row),
            utility_second=_told(info, "metrics/utility_second", row),
        )
        for row, (prompt, first, second) in zip(rows, told)
    ]


def kept(by: np.ndarray, most: int = PER_MARK) -> list[int]:
    """Rows of the duels that are kept: the first of each kind, then more that the oracle labelled, in order.

    >>> kept(np.array(["oracle", "oracle", "oracle", "agent", "oracle"]))
    [0, 1, 3]
    """
    firsts = [int(np.flatnonzero(by == kind)[0]) for kind in ("oracle", "agent", "nobody") if (by == kind).any()]
    more = [int(row) for row in np.flatnonzero(by == "oracle")[1:]]
    return sorted((firsts + more)[:most])


def texts(task: Task, duels: Duels, rows: list[int]) -> list[tuple[str, str, str]]:
    """Prompt, first and second response of the duels at `rows`, as a person reads them."""
    observation, pair = duels.pair.observation, duels.pair.responses
    if task.kind == "text":
        return [(str(observation["prompt"][row]), str(pair[row, 0]), str(pair[row, 1])) for row in rows]
    ids = np.asarray(observation["prompt_id"])[rows]
    first, second = task.texts(ids, pair[rows, 0]), task.texts(ids, pair[rows, 1])
    if first is not None and second is not None:
        return [(prompt, one, other) for (prompt, one), (_, other) in zip(first, second)]
    found = []
    for row in rows:
        vectors = observation["candidates"][row]
        one, other = (f"candidate {k}: {described(vectors[k])}" for k in pair[row])
        found.append((f"context: {described(observation['context'][row])}", one, other))
    return found


def described(vector: np.ndarray) -> str:
    """A vector in a few words.

    >>> described(np.array([0.5, -1.25, 3.0, 0.0, 0.0]))
    '(0.50, -1.25, 3.00, 0.00, ...), 5 numbers'
    """
    shown = ", ".join(f"{value:.2f}" for value in vector[:SHOWN_NUMBERS])
    return f"({shown}{', ...' if len(vector) > SHOWN_NUMBERS else ''}), {len(vector)} numbers"


def cut(text: str, most: int = LONGEST) -> str:
    """The text, or its beginning and how long it is.

    >>> cut("abcdef", 3)
    'abc... [6 characters]'
    """
    return text if len(text) <= most else f"{text[:most]}... [{len(text)} characters]"


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file, none where there is no such file.

    Raises:
        ValueError: a line is no sample; says which.
    """
    if not path.exists():
        return []
    try:
        return [_sample(record) for record in read_metrics(path)]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: expected sample duels, a JSON object per line, got something else: {error}"
        ) from None


def _sample(record: Any) -> Sample:
    """A record as a `Sample`, of the types that its fields have: who wrote it is not known."""
    make: dict[str, Callable[[Any], Any]] = {"int": int, "str": str, "bool": bool, "float | None": _number}
    return Sample(**{field.name: make[str(field.type)](record[field.name]) for field in dataclasses.fields(Sample)})


def _told(info: dict[str, Any], name: str, row: int) -> float | None:
    return _number(info[name][row]) if name in info else None


def _number(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None
