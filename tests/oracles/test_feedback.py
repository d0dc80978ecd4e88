import re

import numpy as np
import pytest

from llm_duel_env.oracles.feedback import Feedback

MANY = np.arange(4000)


def test_threshold_follows_the_probability():
    label = Feedback("threshold").label(np.array([0.51, 0.49, 0.5, 1.0, 0.0]), 0, np.arange(5))
    assert label.tolist() == [1, 0, 0.5, 1, 0]


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_bernoulli_has_the_right_mean_and_no_ties(p):
    label = Feedback("bernoulli").label(np.full(4000, p), 3, MANY)
    assert set(label) <= {0.0, 1.0}
    assert abs(label.mean() - p) <= 4 * np.sqrt(p * (1 - p) / 4000)


def test_flips_have_their_rate_and_do_not_depend_on_the_labels_noise():
    plain = Feedback("bernoulli").label(np.full(4000, 0.5), 3, MANY)
    flipped = Feedback("bernoulli", flip_rate=0.3).label(np.full(4000, 0.5), 3, MANY)
    changed = plain != flipped
    assert abs(changed.mean() - 0.3) < 0.03
    assert abs(changed[plain == 1].mean() - changed[plain == 0].mean()) < 0.06


def test_ties_within_the_margin():
    label = Feedback("bernoulli", tie_margin=0.125, flip_rate=1).label(
        np.array([0.375, 0.625, 0.37, 1.0]), 0, np.arange(4)
    )
    assert label[:2].tolist() == [0.5, 0.5]
    assert label[2] in (0, 1)
    assert label[3] == 0


def test_noise_is_keyed_by_seed_and_number_not_by_batch():
    feedback, p = Feedback("bernoulli", flip_rate=0.2), np.full(200, 0.5)
    whole = feedback.label(p, 7, np.arange(200))
    parts = [feedback.label(p[rows], 7, rows) for rows in np.split(np.random.default_rng(0).permutation(200), [1, 50])]
    order = np.concatenate(np.split(np.random.default_rng(0).permutation(200), [1, 50]))
    assert (whole[order] == np.concatenate(parts)).all()
    assert (whole != feedback.label(p, 8, np.arange(200))).any()
    assert (whole != feedback.label(p, 7, np.arange(1, 201))).any()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"kind": "hard"}, "feedback: expected 'bernoulli' or 'threshold', got 'hard'"),
        ({"flip_rate": 1.1}, "flip_rate: expected a number from 0 to 1, got 1.1"),
        ({"flip_rate": -0.1}, "flip_rate: expected a number from 0 to 1, got -0.1"),
        ({"flip_rate": "a"}, "flip_rate: expected a number from 0 to 1, got 'a'"),
        ({"flip_rate": None}, "flip_rate: expected a number from 0 to 1, got None"),
        ({"flip_rate": True}, "flip_rate: expected a number from 0 to 1, got True"),
        ({"flip_rate": float("nan")}, "flip_rate: expected a number from 0 to 1, got nan"),
        ({"tie_margin": 0.6}, "tie_margin: expected a number from 0 to 0.5, got 0.6"),
        ({"tie_margin": [0.1]}, r"tie_margin: expected a number from 0 to 0.5, got [0.1]"),
    ],
)
def test_bad_settings_are_refused(bad, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        Feedback(**bad)


def test_numbers_of_numpy_are_numbers():
    assert Feedback(flip_rate=np.float32(0.5), tie_margin=np.int64(0)).flip_rate == 0.5


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="a number per probability"):
        Feedback().label(np.array([0.5]), 0, np.arange(2))


@pytest.mark.parametrize("kind", ["threshold", "bernoulli"])
@pytest.mark.parametrize(("flip_rate", "tie_margin"), [(0.0, 0.0), (0.3, 0.0), (0.2, 0.1)])
def test_the_expected_label_is_the_mean_of_labels(kind, flip_rate, tie_margin):
    feedback = Feedback(kind, flip_rate, tie_margin)
    probabilities = np.array([0.05, 0.45, 0.5, 0.58, 0.9])
    means = [feedback.label(np.full(len(MANY), p), 3, MANY).mean() for p in probabilities]
    assert feedback.expected_label(probabilities) == pytest.approx(means, abs=0.03)
    assert np.isnan(feedback.expected_label(np.array([np.nan]))).all()
