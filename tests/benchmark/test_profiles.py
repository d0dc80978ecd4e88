"""Bands over runs, with rliable's formulas (arXiv 2108.13264) written out as the reference."""

import numpy as np
import pytest
from scipy import stats

from llm_duel_env.benchmark import profiles
from llm_duel_env.benchmark.statistics import improvement_interval, probability_of_improvement


def rliable_run_score_deviation(scores, tau):
    return np.mean(scores > tau)


def rliable_aggregate_iqm(scores):
    return stats.trim_mean(scores, proportiontocut=0.25, axis=None)


def rliable_probability_of_improvement(x, y):
    return stats.mannwhitneyu(x, y, alternative="greater")[0] / (len(x) * len(y))


def test_the_profile_is_rliables_share_of_runs_above():
    scores = np.round(np.random.default_rng(0).normal(0.8, 0.05, 10), 2)
    levels = np.array([*np.linspace(0.6, 1.0, 21), *scores])  # at a score itself "above" does not count it
    band = profiles.performance_profile(scores, levels)
    assert band.estimate.tolist() == [rliable_run_score_deviation(scores, tau) for tau in levels]
    assert (band.low <= band.estimate).all()
    assert (band.estimate <= band.high).all()
    assert band.n == 10
    again = profiles.performance_profile(scores, levels)
    assert np.array_equal(band.low, again.low)
    assert np.array_equal(band.high, again.high)


def test_the_profiles_band_is_the_binomials():
    """Of runs drawn with replacement, the number above a level is binomial."""
    scores = np.array([0.0] * 4 + [1.0] * 6)
    band = profiles.performance_profile(scores, np.array([0.5]))
    assert band.low[0] == pytest.approx(stats.binom.ppf(0.025, 10, 0.6) / 10, abs=0.1)
    assert band.high[0] == pytest.approx(stats.binom.ppf(0.975, 10, 0.6) / 10, abs=0.1)
    assert 0.2 <= band.low[0] < 0.6 < band.high[0] <= 1.0


def test_sample_efficiency_is_rliables_iqm_at_each_query():
    draw = np.random.default_rng(1)
    queries = np.array([0.0, 50.0, 100.0])
    values = draw.random((10, 3))
    grid = np.array([0.0, 25.0, 50.0, 100.0])
    curves = [(queries, row) for row in values]
    read = np.stack([np.interp(grid, queries, row) for row in values])
    band = profiles.sample_efficiency(curves, grid)
    assert band.estimate == pytest.approx([rliable_aggregate_iqm(read[:, i]) for i in range(4)])
    mean = profiles.sample_efficiency(curves, grid, "mean")
    assert mean.estimate == pytest.approx(read.mean(axis=0))
    assert (mean.low < mean.estimate).all()
    assert (mean.estimate < mean.high).all()


def test_a_band_resamples_whole_runs():
    """Runs that are flat at their own heights: the same runs are drawn at every query, so the band is flat."""
    curves = [(np.array([0.0, 10.0]), np.full(2, height)) for height in (0.1, 0.5, 0.6, 0.9)]
    band = profiles.sample_efficiency(curves, np.linspace(0, 10, 7), "mean")
    assert np.ptp(band.low) == 0
    assert np.ptp(band.high) == 0
    assert band.low[0] < 0.45 < band.high[0]


def test_what_cannot_be_a_band_is_refused():
    with pytest.raises(ValueError, match="one score per run"):
        profiles.performance_profile(np.zeros((2, 2)), np.zeros(1))
    with pytest.raises(ValueError, match="at least one curve"):
        profiles.sample_efficiency([], np.zeros(1))
    assert profiles.common_grid(200)[[0, 1, -1]].tolist() == [0.0, 4.0, 200.0]


def test_probability_of_improvement_is_rliables_with_an_interval():
    draw = np.random.default_rng(2)
    x, y = draw.normal(0.5, 1.0, 12), draw.normal(0.0, 1.0, 9)
    found = improvement_interval(x, y)
    assert found.estimate == pytest.approx(rliable_probability_of_improvement(x, y))
    assert found.estimate == probability_of_improvement(x, y)
    assert 0 <= found.low < found.estimate < found.high <= 1
    assert found == improvement_interval(x, y)
    assert (found.n, found != improvement_interval(x, y, seed=1)) == (9, True)


def test_improvement_resamples_both_sides_independently():
    """Were runs paired, [0, 1] against itself would always give 1/2."""
    found = improvement_interval([0.0, 1.0], [0.0, 1.0])
    assert (found.estimate, found.low, found.high) == (0.5, 0.0, 1.0)
    certain = improvement_interval([2.0, 3.0, 4.0], [0.0, 1.0])
    assert (certain.estimate, certain.low, certain.high) == (1.0, 1.0, 1.0)
