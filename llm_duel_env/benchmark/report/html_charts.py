"""The report's charts as geometry: what a template draws without computing anything.

A plot is 1000 by 1000 units with the origin at the upper left, as SVG has it, and is stretched to whatever room there
is; ticks, markers and guides are told in per cent of its width and height, so that text keeps its size on a phone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.ticker import MaxNLocator

from llm_duel_env.benchmark.outcome import thinned

UNITS = 1000
POINTS = 51
"""Points of a drawn line, at most: the file stays small, and no eye sees the difference."""
MARKS = 4
"""Markers on a line."""


@dataclass(frozen=True)
class Series:
    """One line of a chart: G points, and its band where there is one."""

    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True)
class Tick:
    """A place on an axis."""

    place: float
    """Per cent of the axis, from the left or from the bottom."""
    text: str


@dataclass(frozen=True)
class Line:
    """A series in the plot's units."""

    label: str
    path: str
    band: str
    marks: list[tuple[float, float]]
    """Per cent from the left and from the bottom; the last is the line's end."""


@dataclass(frozen=True)
class Chart:
    """What a template draws."""

    name: str
    """Part of ids."""
    title: str
    about: str
    """What is drawn, and how many seeds it rests on."""
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    guides: list[Tick] = field(default_factory=list)
    """Horizontal lines with a text."""
    named: bool = True
    """Whether lines are named at their ends, which then are all at the right."""
    diagonal: bool = False
    """Whether a line shows where both axes say the same, which then are of one range."""


def line_chart(
    series: Sequence[Series],
    *,
    name: str,
    title: str,
    about: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    guides: Sequence[tuple[float, str]] = (),
    marks: int = MARKS,
    named: bool = True,
    diagonal: bool = False,
) -> Chart:
    """A chart of lines.

    Args:
        series: at least one, each of finite numbers.
        x_range, y_range: what the axes cover; by default all that is drawn. What lies beyond is cut off.
        guides: heights with a text each.
        marks: markers on each line.
        named, diagonal: see `Chart`.

    Raises:
        ValueError: no series.
    """
    if not series:
        raise ValueError(f"chart {name}: expected at least one line")
    x0, x1 = x_range or span_of([one.x for one in series])
    heights = [values for one in series for values in (one.y, one.low, one.high) if values is not None]
    y0, y1 = y_range or padded(*span_of([*heights, np.array([height for height, _ in guides])]))
    across, up = _scale(x0, x1), _scale(y0, y1)
    lines = []
    for number, one in enumerate(series):
        rows = thinned(len(one.x), POINTS)
        x, y = across(one.x[rows]), up(one.y[rows])
        band = ""
        if one.low is not None and one.high is not None:
            low, high = up(one.low[rows]), up(one.high[rows])
            band = path(np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]])) + "Z"
        places = marked(len(x), marks, number / len(series))
        spots = [(round(100 * float(x[i]), 1), round(100 * float(y[i]), 1)) for i in places]
        lines.append(Line(one.label, path(x, y), band, [(a, b) for a, b in spots if 0 <= b <= 100]))
    return Chart(
        name, title, about, x_label, y_label, ticks(x0, x1), ticks(y0, y1), lines,
        [Tick(round(100 * float(up(np.array([height]))[0]), 2), text) for height, text in guides], named, diagonal,
    )  # fmt: skip


def path(x: np.ndarray, y: np.ndarray) -> str:
    """An SVG path through points given as shares of the plot's width and height, whole units.

    >>> path(np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.25, 1.0]))
    'M0 1000L500 750 1000 0'
    """
    across = np.clip(np.rint(x * UNITS), -UNITS, 2 * UNITS).astype(int)
    down = np.clip(np.rint((1 - y) * UNITS), -UNITS, 2 * UNITS).astype(int)
    points = [f"{a} {b}" for a, b in zip(across, down)]
    return f"M{points[0]}" + (f"L{' '.join(points[1:])}" if len(points) > 1 else "")


def marked(count: int, marks: int, shift: float) -> list[int]:
    """Numbers of the points of a line that carry markers: shifted from line to line, so that they rarely coincide, and
    the last point.

    >>> marked(101, 3, 0.5)
    [25, 75, 100]
    """
    if marks < 1:
        return []
    places = (np.arange(marks - 1) + shift) / max(marks - 1, 1) * (count - 1)
    return [*dict.fromkeys([*places.round().astype(int).tolist(), count - 1])]


def ticks(low: float, high: float, most: int = 6) -> list[Tick]:
    """Round numbers on an axis that runs from `low` to `high`.

    >>> [tick.text for tick in ticks(0.0, 2000.0)]
    ['0', '400', '800', '1,200', '1,600', '2,000']
    """
    found = [float(value) for value in MaxNLocator(most - 1).tick_values(low, high)]
    step = found[1] - found[0]
    digits = next((count for count in range(9) if np.isclose(step, round(step, count), rtol=1e-6, atol=0)), 9)
    span = high - low
    inside = [value for value in found if low - 1e-9 * span <= value <= high + 1e-9 * span]
    return [Tick(round(100 * (value - low) / span, 2), f"{value + 0.0:,.{digits}f}") for value in inside]


def _scale(low: float, high: float) -> Callable[[np.ndarray], np.ndarray]:
    span = high - low if high > low else 1.0
    return lambda values: (values - low) / span


def span_of(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """The least and the greatest of all values."""
    together = np.concatenate([np.ravel(one) for one in values])
    return float(together.min()), float(together.max())


def padded(low: float, high: float, share: float = 0.04) -> tuple[float, float]:
    """The span with some room on both sides."""
    room = share * (high - low) or 0.05
    return low - room, high + room
