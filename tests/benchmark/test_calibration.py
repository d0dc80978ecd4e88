"""Calibration against hand computations and against beliefs that are right by construction."""

import numpy as np
import pytest
from scipy import stats

from llm_duel_env.benchmark.calibration import calibration, correlation, expected_calibration_error


def test_by_hand():
    probability = np.array([0.8, 0.8, 0.4, 0.6, 0.5])
    truth = np.array([1.0, 0.0, 0.0, 1.0, 0.5])  # the last pair has no winner
    spread = np.array([0.3, 0.4, 0.1, 0.2, 9.0])
    found = calibration(probability, spread, truth)
    assert found["accuracy"] == 0.75
    # Confidence 0.8, right half the time; 0.6 (twice), always right: (2 * 0.3 + 2 * 0.4) / 4.
    assert found["calibration_error"] == pytest.approx(0.35)
    error = [0.2, 0.8, 0.4, 0.4]
    assert found["spread_tells_error"] == pytest.approx(stats.spearmanr(spread[:4], error).statistic)
    doubt = [0.2, 0.2, 0.4, 0.4]
    assert found["doubt_tells_error"] == pytest.approx(stats.spearmanr(doubt, error).statistic)


def test_naming_a_pair_the_other_way_round_changes_nothing():
    draw = np.random.default_rng(0)
    probability, spread, truth = draw.random(40), draw.random(40), draw.random(40)
    turned = draw.random(40) < 0.5
    other = calibration(np.where(turned, 1 - probability, probability), spread, np.where(turned, 1 - truth, truth))
    assert other == pytest.approx(calibration(probability, spread, truth))


def test_a_belief_that_is_the_truth_has_no_error_and_an_overconfident_one_has():
    draw = np.random.default_rng(1)
    truth = draw.random(20_000)
    assert expected_calibration_error(truth, truth) == pytest.approx(0, abs=1e-12)
    labels = (draw.random(20_000) < truth).astype(float)
    assert expected_calibration_error(truth, labels) < 0.015
    sure = np.where(truth > 0.5, 0.99, 0.01)  # right three times in four
    assert expected_calibration_error(sure, labels) == pytest.approx(0.24, abs=0.015)


def test_a_spread_that_knows_is_told_from_one_that_does_not():
    draw = np.random.default_rng(2)
    probability = draw.random(4000)
    spread = draw.random(4000)
    truth = np.clip(probability + spread * draw.normal(size=4000) * 0.2, 0, 1)
    assert calibration(probability, spread, truth)["spread_tells_error"] > 0.4
    assert abs(calibration(probability, draw.random(4000), truth)["spread_tells_error"]) < 0.06


def test_nothing_is_said_of_nothing():
    none = calibration(np.array([0.7, 0.4]), np.array([0.1, 0.2]), np.array([0.5, np.nan]))
    assert all(np.isnan(value) for value in none.values())
    assert np.isnan(correlation(np.ones(5), np.arange(5.0)))
    assert np.isnan(correlation(np.arange(2.0), np.arange(2.0)))
    with pytest.raises(ValueError, match="one length"):
        calibration(np.zeros(2), np.zeros(3), np.zeros(2))
