"""How an agent's lines are told from the others': by colour, dashes and marker together, the same all over the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm_duel_env.benchmark.report.plots import DASHES, FIXED, PALETTE

SHAPES = 8
"""Markers that the template knows."""
ALL_SHOWN = 8
"""Agents up to which a table's lines are all drawn at first."""
BEST_SHOWN = 4
"""Of more, so many of the best are, and those that every comparison has; the legend shows the others."""
ALWAYS_SHOWN = ("sea", "online_dpo", "offline_dpo")


@dataclass(frozen=True)
class Look:
    """Numbers of a colour, of dashes and of a marker, which the style sheet and the template know."""

    colour: int
    dash: int
    marker: int


@dataclass(frozen=True)
class Style:
    """An agent's look, and its place in one table."""

    number: int
    look: Look
    shown: bool
    """Whether its lines are drawn before the reader chooses."""


def looks_of(tables: Sequence[Sequence[str]]) -> dict[str, Look]:
    """A look of its own for each label of any table; within a table colours differ as far as they go, solid lines
    first. Agents that every comparison has keep the colour that they have in the figures.

    >>> looks_of([["ann", "sea"], ["ann"]])
    {'sea': Look(colour=0, dash=0, marker=0), 'ann': Look(colour=1, dash=0, marker=3)}
    """
    everybody = list(dict.fromkeys(label for labels in tables for label in labels))
    looks = {label: Look(FIXED[label], 0, FIXED[label] % 3) for label in everybody if label in FIXED}
    free = [colour for colour in range(len(PALETTE)) if colour not in {look.colour for look in looks.values()}]
    taken: Counter[int] = Counter()
    for labels in tables:
        here = Counter(looks[label].colour for label in labels if label in looks)
        for label in labels:
            if label not in looks:
                colour = min(free, key=lambda one: (here[one], taken[one]))
                # Where colour and dashes come again, the marker is another one.
                marker = 3 + (free.index(colour) + taken[colour] // len(DASHES)) % (SHAPES - 3)
                looks[label] = Look(colour, taken[colour] % len(DASHES), marker)
                here[colour] += 1
                taken[colour] += 1
    return looks


def styles(labels: Sequence[str], looks: Mapping[str, Look]) -> dict[str, Style]:
    """The agents of one table, given from the best to the worst."""
    few = len(labels) <= ALL_SHOWN
    return {
        label: Style(number, looks[label], few or number < BEST_SHOWN or label in ALWAYS_SHOWN)
        for number, label in enumerate(labels)
    }
