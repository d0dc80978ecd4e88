"""What a replay has shown: how many rounds, labels and evaluations came out the same, and where the first did not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llm_duel_env.ledger import Record

COMPARED = ("prompt_id", "first", "second", "label")
"""What of a ledger's record must be the same."""


@dataclass(frozen=True)
class Replay:
    """What playing a run's first rounds again has shown."""

    rounds: int = 0
    """Rounds whose labels were compared."""
    rounds_equal: int = 0
    labels: int = 0
    labels_equal: int = 0
    evaluations: int = 0
    """Points of the learning curve that were compared, the first one before any label among them."""
    evaluations_equal: int = 0
    difference: str = ""
    """The first difference in words; empty where there is none."""

    @property
    def equal(self) -> bool:
        """Whether all that was compared is the same, and anything was."""
        return not self.difference and bool(self.labels or self.evaluations)

    def as_found(self) -> dict[str, Any]:
        """For a result's "replay"; see `results.checked`."""
        return dataclasses.asdict(self) | {"equal": self.equal}

    def __str__(self) -> str:
        parts = [
            f"{getattr(self, f'{name}_equal')} of {getattr(self, name)} {name}"
            for name in ("rounds", "labels", "evaluations")
            if getattr(self, name)
        ]
        told = f"{', '.join(parts) or 'nothing'} the same"
        return f"{told}; first difference: {self.difference}" if self.difference else told


def compare_labels(seen: Replay, held: Sequence[Record], mine: Sequence[Record]) -> Replay:
    """What was seen, with the labels of its rounds compared: those that a run holds with those of the replay."""
    then, now = _by_round(held, seen.rounds), _by_round(mine, seen.rounds)
    rounds_equal = labels = labels_equal = 0
    difference = ""
    for number in range(seen.rounds):
        pairs = list(zip(then[number], now[number]))
        same = [all(a[name] == b[name] for name in COMPARED) for a, b in pairs]
        labels += len(then[number])
        labels_equal += sum(same)
        if all(same) and len(then[number]) == len(now[number]):
            rounds_equal += 1
        elif not difference:
            difference = _first(number, pairs, same, len(then[number]), len(now[number]))
    return dataclasses.replace(
        seen,
        rounds_equal=rounds_equal,
        labels=labels,
        labels_equal=labels_equal,
        difference=difference or seen.difference,
    )


def _first(number: int, pairs: list[tuple[Record, Record]], same: list[bool], then: int, now: int) -> str:
    if all(same):
        return f"round {number + 1}: {then} labels were bought, here {now}"
    was, now_is = pairs[same.index(False)]
    name = next(name for name in COMPARED if was[name] != now_is[name])
    told, here = (repr(record[name])[:80] for record in (was, now_is))
    return f"round {number + 1}, query {was['query']}: {name} was {told}, here {here}"


def _by_round(records: Iterable[Record], rounds: int) -> dict[int, list[Record]]:
    found: dict[int, list[Record]] = {number: [] for number in range(rounds)}
    for record in records:
        if record["round"] in found:
            found[record["round"]].append(record)
    return found
