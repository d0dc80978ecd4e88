"""Whether beliefs about pairs of responses hold: accuracy, calibration error, does their spread tell their error?"""

from __future__ import annotations

import numpy as np
from scipy import stats

from llm_duel_env.metrics import hard
from llm_duel_env.types import Metrics

BINS = 10


def calibration(probability: np.ndarray, spread: np.ndarray, truth: np.ndarray) -> Metrics:
    """A belief P(first beats second) of P pairs, with its spread, against the probability that the label says so.

    Args:
        probability: (P,) believed, in [0, 1].
        spread: (P,) how far those who were asked differ about a pair, at least 0.
        truth: (P,) in [0, 1]. Pairs at exactly 1/2 have no winner and are left out.

    Returns:
        ``accuracy``, ``calibration_error``, ``spread_tells_error`` and ``doubt_tells_error`` (rank correlations of
        |probability - truth| with the spread, and with 1/2 - |probability - 1/2|); NaN where nothing can be said.

    Raises:
        ValueError: shapes that differ.
    """
    if not probability.shape == spread.shape == truth.shape or probability.ndim != 1:
        shapes = f"{probability.shape}, {spread.shape}, {truth.shape}"
        raise ValueError(f"calibration: expected three vectors of one length, got {shapes}")
    kept = ~np.isnan(truth) & (truth != 0.5)
    probability, spread, truth = probability[kept], spread[kept], truth[kept]
    if not len(truth):
        return dict.fromkeys(("accuracy", "calibration_error", "spread_tells_error", "doubt_tells_error"), float("nan"))
    doubt, error = 0.5 - np.abs(probability - 0.5), np.abs(probability - truth)
    ranked = stats.rankdata(np.stack([spread, doubt, error]), axis=1)
    return {
        "accuracy": float(1 - np.abs(hard(probability) - hard(truth)).mean()),
        "calibration_error": expected_calibration_error(probability, truth),
        "spread_tells_error": correlation(ranked[0], ranked[2]),
        "doubt_tells_error": correlation(ranked[1], ranked[2]),
    }


def expected_calibration_error(probability: np.ndarray, truth: np.ndarray, bins: int = BINS) -> float:
    """Sum over bins of confidence of (share of pairs) * |mean confidence - mean probability of being right|.

    Confidence is max(p, 1 - p), so that naming the pair the other way round changes nothing; bins are of one width
    over [1/2, 1].

    >>> round(expected_calibration_error(np.array([0.9, 0.1, 0.9, 0.1]), np.array([1.0, 0.0, 1.0, 1.0])), 6)
    0.15
    """
    confidence = np.maximum(probability, 1 - probability)
    right = np.where(probability >= 0.5, truth, 1 - truth)
    number = np.minimum((2 * bins * (confidence - 0.5)).astype(int), bins - 1)
    gaps = np.bincount(number, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's, of ranks Spearman's; NaN for fewer than three pairs and where either is constant."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
