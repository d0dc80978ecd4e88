"""Figures as text, the same in every output; a dash says that a figure does not exist."""

from __future__ import annotations

from llm_duel_env.benchmark.leaderboard import Row
from llm_duel_env.benchmark.statistics import Interval

NONE = "–"


def name(row: Row) -> str:
    """An agent's label, starred where its method was rebuilt from notes or code."""
    return row.label + ("*" if row.provenance == "reconstructed" else "")


def number(value: float | None, form: str, ends: tuple[float, float] | None = None) -> str:
    """A figure, with the ends of its interval where there are any.

    >>> number(0.51234, ".2f", (0.4, 0.6)), number(None, ".2f")
    ('0.51 [0.40, 0.60]', '–')
    """
    if value is None:
        return NONE
    return f"{value:{form}}" + (f" [{ends[0]:{form}}, {ends[1]:{form}}]" if ends else "")


def difference(found: Interval | None, form: str = "+.3f") -> str:
    """A paired difference with its interval."""
    return NONE if found is None else number(found.estimate, form, (found.low, found.high))


def rank(row: Row) -> str:
    """The rank: "2=" where some other ranked agent is not told from it, then the bootstrap interval of the rank by
    mean."""
    if row.place is None:
        return NONE
    interval = "" if row.rank is None else f" [{row.rank.low:.3g}, {row.rank.high:.3g}]"
    return f"{row.place}{'=' if row.tied else ''}{interval}"
