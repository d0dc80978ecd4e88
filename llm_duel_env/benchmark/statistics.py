"""The statistics of the tables: pure functions, and every bootstrap seeded.

A *curve* is a pair of arrays of one length G: oracle queries (rising) and the value at each evaluation.
Per-seed results are mappings from seed to value, so that two agents can be paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy import integrate, optimize, stats

from llm_duel_env.randomness import generator

RESAMPLES = 10_000
SHARE_OF_GAIN = 0.95
MARK_EVERY = 0.02
"""Share of the budget between two marks at which learning curves are read off."""
SEEDS_NEEDED = {"finite": 10, "text": 5}
"""Seeds below which a table gives neither an interval over seeds nor a rank, by the task's kind."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its bootstrap interval."""

    estimate: float
    low: float
    high: float
    """NaN, as `low`, where there are too few observations for an interval."""
    n: int
    """Observations it rests on."""

    def bare(self) -> Interval:
        """The estimate without its ends."""
        return replace(self, low=math.nan, high=math.nan)

    @property
    def has_ends(self) -> bool:
        """Whether it is an interval, and not an estimate alone."""
        return not math.isnan(self.low)


def iqm(values: Sequence[float] | np.ndarray) -> float:
    """Interquartile mean: the mean of what is left when a quarter is trimmed from each end (as rliable defines it).

    >>> iqm([0.0, 1.0, 2.0, 100.0])
    1.5
    """
    return float(stats.trim_mean(_vector("iqm", values), 0.25))


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda sample: sample.mean(axis=-1),
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """Percentile bootstrap.

    Args:
        values: (n,) observations.
        statistic: maps (..., n) to (...), by default the mean.
        seed: of the resampling; the same seed gives the same interval.
        level: coverage aimed at.
        resamples: how many samples of n are drawn with replacement.
    """
    vector = _vector("bootstrap_interval", values)
    samples = statistic(vector[_resampled(len(vector), resamples, seed)])
    low, high = _percentiles(samples, level)
    return Interval(float(statistic(vector)), low, high, len(vector))


def paired_difference(
    a: Mapping[int, float], b: Mapping[int, float], *, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of ``a - b`` over the seeds that both have, with a bootstrap interval over those seeds.

    Raises:
        ValueError: no seed in common.
    """
    left, right = _paired(a, b)
    return bootstrap_interval(left - right, seed=seed, level=level)


def probability_of_improvement(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """P(A > B) + P(A = B) / 2 for one run of each drawn at random (Mann-Whitney's U over its maximum).

    >>> probability_of_improvement([1.0, 2.0], [0.0, 2.0])
    0.625
    """
    left, right = _vector("a", a)[:, None], _vector("b", b)[None, :]
    return float(((left > right) + 0.5 * (left == right)).mean())


def improvement_interval(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, *, seed: int = 0, level: float = 0.95
) -> Interval:
    """`probability_of_improvement` with a bootstrap interval that resamples the runs of A and of B independently of
    each other, as rliable does: runs are not paired by seed here."""
    left, right = _vector("a", a), _vector("b", b)
    size = (2000, len(left), len(right))
    draw = generator(seed, "improvement", len(left), len(right))
    x = left[draw.integers(0, size[1], size[:2])][:, :, None]
    y = right[draw.integers(0, size[2], (size[0], size[2]))][:, None, :]
    low, high = _percentiles(((x > y) + 0.5 * (x == y)).mean(axis=(1, 2)), level)
    return Interval(probability_of_improvement(left, right), low, high, min(size[1:]))


def isotonic(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The closest non-decreasing curve in least squares (pool adjacent violators).

    >>> isotonic([1.0, 3.0, 2.0, 4.0]).tolist()
    [1.0, 2.5, 2.5, 4.0]
    """
    return np.asarray(optimize.isotonic_regression(_vector("isotonic", values)).x)


def marks(budget: float, batch: int, every: float | None = None) -> np.ndarray:
    """The queries at which the learning curves of a table are read off, evenly from none to the budget.

    They are `MARK_EVERY` of it apart, or as far as rounds of queries, or as the evaluations (`every`, a share of the
    budget, where it is known), whatever is most.

    Runs are evaluated where rounds end, and rounds whose labels are partly free are shorter: a run with more
    evaluations than another would be seen to cross a target earlier.

    >>> marks(1000, 240).tolist()
    [0.0, 250.0, 500.0, 750.0, 1000.0]
    """
    return np.linspace(0.0, budget, max(int(budget / max(MARK_EVERY * budget, (every or 0) * budget, batch)), 1) + 1)


def mean_curve(
    curves: Sequence[tuple[np.ndarray, np.ndarray]], grid: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of several curves at the queries of `grid`, or of the first, read off by linear interpolation.

    Agents that abstain cross the marks of the evaluation grid at slightly different counts from seed to seed.
    """
    grid = np.asarray(curves[0][0] if grid is None else grid, np.float64)
    return grid, values_at(curves, grid).mean(axis=0)


def values_at(curves: Sequence[tuple[np.ndarray, np.ndarray]], grid: np.ndarray) -> np.ndarray:
    """The curves at the queries of `grid` (G,), by linear interpolation: (len(curves), G)."""
    return np.stack([np.interp(grid, queries, values) for queries, values in curves])


def target_of(
    curves: Sequence[tuple[np.ndarray, np.ndarray]], grid: np.ndarray | None = None, share: float = SHARE_OF_GAIN
) -> float | None:
    """The value at which `share` of the gain of the seed-mean isotonic curve (at the queries of `grid`, or of the first
    curve) is reached; None where nothing is gained.

    >>> round(target_of([(np.array([0, 10, 20]), np.array([0.5, 0.6, 0.7]))]), 6)
    0.69
    """
    _, mean = mean_curve(curves, grid)
    smooth = isotonic(mean)
    gain = smooth[-1] - smooth[0]
    return float(smooth[0] + share * gain) if gain > 0 else None


def queries_to_target(queries: np.ndarray, values: np.ndarray, target: float) -> float | None:
    """Queries at the first evaluation of two running that both stand at or above `target`; None where there is none.

    The last evaluation alone does not count: nothing after it shows that the crossing lasts. Such a run is censored.

    >>> queries_to_target(np.array([0, 10, 20, 30]), np.array([0.5, 0.8, 0.6, 0.9]), 0.7) is None
    True
    >>> queries_to_target(np.array([0, 10, 20, 30]), np.array([0.5, 0.6, 0.8, 0.9]), 0.7)
    20.0
    """
    queries, values = np.asarray(queries), np.asarray(values)
    if queries.shape != values.shape or queries.ndim != 1:
        raise ValueError(f"a curve needs one value per evaluation, got shapes {queries.shape} and {values.shape}")
    above = values >= target
    sustained = np.flatnonzero(above[:-1] & above[1:])
    return float(queries[sustained[0]]) if len(sustained) else None


def area_under(queries: np.ndarray, values: np.ndarray) -> float:
    """Mean height of a curve over its queries, by trapezoids.

    >>> area_under(np.array([0, 10, 20]), np.array([0.5, 0.7, 0.7]))
    0.65
    >>> area_under(np.array([0, 0]), np.array([0.5, 0.6]))  # never a query, as of an agent that labels its own pairs
    0.6
    """
    queries, values = np.asarray(queries, np.float64), np.asarray(values, np.float64)
    if len(queries) < 2 or queries[-1] == queries[0]:
        return float(values[-1])
    return float(integrate.trapezoid(values, queries) / (queries[-1] - queries[0]))


def paired_ratio(a: Mapping[int, float], b: Mapping[int, float], *, seed: int = 0, level: float = 0.95) -> Interval:
    """mean(a) / mean(b) over the seeds that both have, with a bootstrap interval that resamples seeds in pairs.

    Raises:
        ValueError: no seed in common, or a value of b that is not positive.
    """
    left, right = _paired(a, b)
    if not (right > 0).all():
        raise ValueError(f"paired_ratio: expected positive values below the line, got {right.min()}")
    rows = _resampled(len(left), RESAMPLES, seed)
    low, high = _percentiles(left[rows].mean(axis=1) / right[rows].mean(axis=1), level)
    return Interval(float(left.mean() / right.mean()), low, high, len(left))


def ranks(scores: Mapping[str, Mapping[int, float]], *, seed: int = 0, level: float = 0.95) -> dict[str, Interval]:
    """Rank of each agent by mean score (1 is the highest, ties share the mean rank), with its bootstrap interval.

    Seeds that all agents have are resampled together.

    Raises:
        ValueError: no seed that all agents have.
    """
    common = sorted(set.intersection(*(set(by_seed) for by_seed in scores.values())))
    if not common:
        raise ValueError("ranks: expected a seed that all agents have, got none")
    table = np.array([[by_seed[s] for s in common] for by_seed in scores.values()])  # (agents, seeds)
    means = table[:, _resampled(len(common), 2000, seed)].mean(axis=2)  # (agents, resamples)
    sampled = stats.rankdata(-means, axis=0)
    point = stats.rankdata(-table.mean(axis=1))
    return {
        agent: Interval(float(point[i]), *_percentiles(sampled[i], level), len(common))
        for i, agent in enumerate(scores)
    }


@dataclass(frozen=True)
class Place:
    """Where an agent stands among others."""

    place: int
    """1 + the number of agents that are above it and told from it."""
    tied: tuple[str, ...]
    """The agents that it is not told from."""


def places(
    scores: Mapping[str, Mapping[int, float]], *, needed: int = 1, seed: int = 0, level: float = 0.95
) -> dict[str, Place]:
    """The place of each agent. Two agents are told apart where they have `needed` seeds in common and the bootstrap
    interval of their difference, paired by seed, excludes 0; not being told apart is no equivalence, and A may tie with
    B and B with C where A beats C.

    >>> seeds = range(10)
    >>> close = {s: 0.9 + 0.01 * (-1) ** s for s in seeds}
    >>> found = places({"a": dict.fromkeys(seeds, 0.9), "b": close, "c": dict.fromkeys(seeds, 0.5)})
    >>> [(found[name].place, found[name].tied) for name in "abc"]
    [(1, ('b',)), (1, ('a',)), (3, ())]
    """
    names = list(scores)
    above, tied = dict.fromkeys(names, 0), {name: list[str]() for name in names}
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            found = None
            if len(set(scores[one]) & set(scores[other])) >= needed:
                found = paired_difference(scores[one], scores[other], seed=seed, level=level)
            if found is not None and found.low > 0:
                above[other] += 1
            elif found is not None and found.high < 0:
                above[one] += 1
            else:
                tied[one].append(other)
                tied[other].append(one)
    return {name: Place(1 + above[name], tuple(tied[name])) for name in names}


def _vector(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    vector = np.asarray(values, np.float64)
    if vector.ndim != 1 or not len(vector):
        raise ValueError(f"{name}: expected a vector of at least one number, got shape {vector.shape}")
    return vector


def _paired(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    common = sorted(set(a) & set(b))
    if not common:
        raise ValueError(f"expected a seed in common, got {sorted(a)} and {sorted(b)}")
    return np.array([a[s] for s in common], np.float64), np.array([b[s] for s in common], np.float64)


@lru_cache(maxsize=16)
def _resampled(n: int, resamples: int, seed: int) -> np.ndarray:
    """(resamples, n) row numbers; kept, as a table asks for the same ones many times."""
    rows = generator(seed, "bootstrap", n).integers(0, n, (resamples, n))
    rows.setflags(write=False)
    return rows


def _percentiles(samples: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.percentile(samples, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)
