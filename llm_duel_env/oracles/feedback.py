"""How the oracle's probability becomes a label: threshold or Bernoulli, with flips and ties. The one place for it."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal

import numpy as np

from llm_duel_env.randomness import uniforms


@dataclass(frozen=True)
class Feedback:
    """Turns P(first beats second) into labels: 1 the first wins, 0 the second wins, 1/2 a tie.

    The noise of a label is keyed by (seed, query number), so it does not depend on the batch the query was made in.

    Example:
        >>> probability = np.array([0.9, 0.2, 0.5, 0.51])
        >>> numbers = np.arange(4)
        >>> Feedback("threshold").label(probability, seed=0, numbers=numbers)
        array([1. , 0. , 0.5, 1. ])
        >>> Feedback("threshold", tie_margin=0.05).label(probability, seed=0, numbers=numbers)
        array([1. , 0. , 0.5, 0.5])
        >>> Feedback("threshold", flip_rate=1.0).label(probability, seed=0, numbers=numbers)
        array([0. , 1. , 0.5, 0. ])
    """

    kind: Literal["bernoulli", "threshold"] = "bernoulli"
    """bernoulli: the first wins with the probability given. threshold: it wins where that is above 1/2."""
    flip_rate: float = 0.0
    """Probability with which a decided label is turned round."""
    tie_margin: float = 0.0
    """A tie where the probability is this close to 1/2. At 0, Bernoulli feedback has no ties, and threshold feedback
    has one at exactly 1/2."""

    def __post_init__(self) -> None:
        if self.kind not in ("bernoulli", "threshold"):
            raise ValueError(f"feedback: expected 'bernoulli' or 'threshold', got {self.kind!r}")
        for name, most in (("flip_rate", 1), ("tie_margin", 0.5)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= most:
                raise ValueError(f"{name}: expected a number from 0 to {most}, got {value!r}")

    def label(self, probability: np.ndarray, seed: int, numbers: np.ndarray) -> np.ndarray:
        """The labels of the queries with these numbers.

        Args:
            probability: (M,) P(first beats second).
            seed: Seed of the run.
            numbers: (M,) the number of each query in the run.

        Returns:
            (M,) float64 in {0, 1/2, 1}.
        """
        probability, numbers = np.asarray(probability, np.float64), np.asarray(numbers)
        if probability.ndim != 1 or numbers.shape != probability.shape:
            raise ValueError(f"expected a number per probability, got {numbers.shape} for {probability.shape}")
        if self.kind == "threshold":
            label = np.where(probability == 0.5, 0.5, (probability > 0.5).astype(np.float64))
        else:
            label = (uniforms(seed, "label", numbers) < probability).astype(np.float64)
        if self.flip_rate > 0:
            label = np.where(uniforms(seed, "flip", numbers) < self.flip_rate, 1 - label, label)
        if self.tie_margin > 0:
            label = np.where(np.abs(probability - 0.5) <= self.tie_margin, 0.5, label)
        return label

    def expected_label(self, probability: np.ndarray) -> np.ndarray:
        """The mean of the labels of such a duel, a tie as 1/2: (M,) in [0, 1]; NaN stays NaN.

        >>> Feedback("threshold", flip_rate=0.1).expected_label(np.array([0.9, 0.5, 0.2])).tolist()
        [0.9, 0.5, 0.1]
        >>> Feedback("bernoulli", flip_rate=0.5).expected_label(np.array([0.9])).tolist()
        [0.5]
        """
        probability = np.asarray(probability, np.float64)
        mean = probability if self.kind == "bernoulli" else (np.sign(probability - 0.5) + 1) / 2
        mean = mean * (1 - self.flip_rate) + (1 - mean) * self.flip_rate
        return np.where(np.abs(probability - 0.5) <= self.tie_margin, 0.5, mean) if self.tie_margin > 0 else mean
