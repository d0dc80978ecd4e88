"""The statistics against hand computations."""

import numpy as np
import pytest
from scipy import stats

from llm_duel_env.benchmark import statistics as s


def test_iqm_is_the_mean_of_the_middle_half():
    values = [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -70.0]
    assert s.iqm(values) == (2 + 3 + 4 + 5) / 4
    assert s.iqm(values) == stats.trim_mean(values, 0.25)  # rliable's formula


def test_bootstrap_is_seeded_and_close_to_theory():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = s.bootstrap_interval(values, seed=1)
    assert found == s.bootstrap_interval(values, seed=1)
    assert found != s.bootstrap_interval(values, seed=2)
    assert found.estimate == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20  # standard error of the mean of 400
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)


def test_bootstrap_takes_other_statistics():
    found = s.bootstrap_interval([1.0, 1.0, 1.0, 9.0], lambda x: np.median(x, axis=-1))
    assert (found.estimate, found.low) == (1.0, 1.0)


def test_paired_difference_removes_what_seeds_share():
    a = {seed: 10.0 * seed + 1 for seed in range(8)}
    b = {seed: 10.0 * seed for seed in range(1, 9)}
    found = s.paired_difference(a, b)
    assert (found.estimate, found.low, found.high, found.n) == (1.0, 1.0, 1.0, 7)
    with pytest.raises(ValueError, match="seed in common"):
        s.paired_difference({0: 1.0}, {1: 1.0})


def test_probability_of_improvement_counts_pairs():
    # (3 > 1), (3 > 2), (2 > 1) and the tie (2 = 2): 3.5 of 4.
    assert s.probability_of_improvement([3.0, 2.0], [1.0, 2.0]) == 3.5 / 4
    assert s.probability_of_improvement([1.0, 2.0], [3.0, 2.0]) == 0.5 / 4


def test_isotonic_pools_violators():
    # 5, 3, 1 pool to 3; the 4 after them stands.
    assert s.isotonic([2.0, 5.0, 3.0, 1.0, 4.0]).tolist() == pytest.approx([2.0, 3.0, 3.0, 3.0, 4.0])
    assert s.isotonic([3.0, 2.0, 1.0]).tolist() == pytest.approx([2.0, 2.0, 2.0])


def test_mean_curve_interpolates_at_the_first_grid():
    grid, mean = s.mean_curve(
        [(np.array([0, 10, 20]), np.array([0.0, 1.0, 2.0])), (np.array([0, 20]), np.array([0, 4]))]
    )
    assert grid.tolist() == [0, 10, 20]
    assert mean.tolist() == [0.0, 1.5, 3.0]


def test_target_is_95_percent_of_the_gain():
    queries = np.array([0, 10, 20, 30])
    # Means 0.5, 0.6, 0.8, 0.7; isotonic 0.5, 0.6, 0.75, 0.75; gain 0.25.
    curves = [(queries, np.array([0.5, 0.7, 0.7, 0.7])), (queries, np.array([0.5, 0.5, 0.9, 0.7]))]
    assert s.target_of(curves) == pytest.approx(0.5 + 0.95 * 0.25)
    assert s.target_of([(queries, np.array([0.6, 0.5, 0.5, 0.4]))]) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, 0.8, 0.8, 0.5], 10.0),
        ([0.5, 0.8, 0.6, 0.8], None),  # never twice running; the last alone is censored
        ([0.5, 0.6, 0.7, 0.7], 20.0),  # at the target counts
        ([0.9, 0.9, 0.1, 0.1], 0.0),
        ([0.5, 0.6, 0.6, 0.6], None),
    ],
)
def test_queries_to_target_wants_two_evaluations_running(values, expected):
    assert s.queries_to_target(np.array([0, 10, 20, 30]), np.array(values), 0.7) == expected


def test_queries_to_target_refuses_other_shapes():
    with pytest.raises(ValueError, match="one value per evaluation"):
        s.queries_to_target(np.arange(3), np.zeros(4), 0.5)


def test_paired_ratio_is_of_means():
    found = s.paired_ratio({0: 10.0, 1: 30.0}, {0: 20.0, 1: 60.0})
    assert (found.estimate, found.low, found.high) == (0.5, 0.5, 0.5)
    found = s.paired_ratio({0: 10.0, 1: 30.0}, {0: 40.0, 1: 40.0})
    assert found.estimate == 0.5
    assert (found.low, found.high) == (0.25, 0.75)  # one seed twice, with probability 1/4 each


def test_ranks_share_ties_and_carry_uncertainty():
    scores = {"a": {0: 3.0, 1: 3.0}, "b": {0: 1.0, 1: 1.0}, "c": {0: 1.0, 1: 1.0}}
    found = s.ranks(scores)
    assert [found[name].estimate for name in "abc"] == [1.0, 2.5, 2.5]
    wavering = s.ranks({"a": {0: 3.0, 1: 0.0}, "b": {0: 1.0, 1: 1.0}})
    assert (wavering["a"].low, wavering["a"].high) == (1.0, 2.0)


def test_places_follow_what_is_told_apart_and_not_the_order_of_means():
    """A and B tie, B and C tie, and A beats C: being told apart is no order of blocks."""
    noise = np.array([-1, 1] * 5) * 0.01
    a = {seed: 0.906 + 0.1 * seed for seed in range(10)}
    b = {seed: 0.903 + 0.1 * seed + noise[seed] for seed in range(10)}
    c = {seed: 0.900 + 0.1 * seed for seed in range(10)}
    found = s.places({"c": c, "b": b, "a": a})
    assert {name: found[name].place for name in "abc"} == {"a": 1, "b": 1, "c": 2}
    assert found["b"].tied == ("c", "a")
    assert found["a"].tied == ("b",)
    assert s.paired_difference(a, c).low > 0
    assert s.paired_difference(a, b).low <= 0 <= s.paired_difference(a, b).high
    apart = s.places({"a": a, "d": {seed + 9: value - 1 for seed, value in c.items()}}, needed=10)
    assert {name: (one.place, one.tied) for name, one in apart.items()} == {"a": (1, ("d",)), "d": (1, ("a",))}


def test_places_count_who_is_told_to_be_above():
    scores = {name: {seed: height + 0.1 * seed for seed in range(10)} for name, height in zip("abcd", (4, 3, 3, 1))}
    found = s.places(scores)
    assert [found[name].place for name in "abcd"] == [1, 2, 2, 4]
    assert [found[name].tied for name in "abcd"] == [(), ("c",), ("b",), ()]


@pytest.mark.parametrize("values", [[], np.zeros((2, 2))])
def test_only_vectors_have_statistics(values):
    with pytest.raises(ValueError, match="vector"):
        s.iqm(values)
