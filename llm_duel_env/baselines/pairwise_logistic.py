"""Logistic regression on differences of features: the estimator behind the classical contextual dueling bandits.

The model is Bradley-Terry with linear utility: P(a beats b) = sigmoid(theta . z), z = x_a - x_b. All is float64.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular
from scipy.special import expit

MOST_STEPS = 100
CLOSE_ENOUGH = 1e-20
"""Half the squared Newton decrement (about how far the loss is above its minimum, in nats) at which a fit ends."""


def regularised_loss(theta: np.ndarray, differences: np.ndarray, first_wins: np.ndarray, regulariser: float) -> float:
    """sum_t [log(1 + exp(z_t . theta)) - y_t z_t . theta] + regulariser / 2 |theta|^2, in nats.

    Args:
        theta: (D,).
        differences: (T, D), z.
        first_wins: (T,) in [0, 1], y; a tie is 1/2.
        regulariser: above 0.
    """
    margins = differences @ theta
    return float(np.logaddexp(0, margins).sum() - first_wins @ margins + regulariser / 2 * theta @ theta)


def hessian(theta: np.ndarray, differences: np.ndarray, regulariser: float) -> np.ndarray:
    """The second derivative of `regularised_loss`, (D, D): sum_t s_t (1 - s_t) z_t z_t^T + regulariser I."""
    chance = expit(differences @ theta)
    weighted = differences * (chance * (1 - chance))[:, None]
    return weighted.T @ differences + regulariser * np.eye(differences.shape[1])


def fit(
    differences: np.ndarray, first_wins: np.ndarray, regulariser: float, start: np.ndarray
) -> tuple[np.ndarray, int]:
    """The minimum of `regularised_loss`, which is strictly convex, by damped Newton steps: theta (D,), and the steps.

    Raises:
        ArithmeticError: no minimum after `MOST_STEPS` steps.
    """
    theta = start
    for step in range(MOST_STEPS):
        gradient = differences.T @ (expit(differences @ theta) - first_wins) + regulariser * theta
        direction = cho_solve(cho_factor(hessian(theta, differences, regulariser)), gradient)
        decrement = float(gradient @ direction) / 2
        if decrement <= CLOSE_ENOUGH:
            return theta, step
        length, loss = 1.0, regularised_loss(theta, differences, first_wins, regulariser)
        # The slack is rounding: so near the minimum the loss itself can no longer tell whether a step helps.
        while regularised_loss(
            theta - length * direction, differences, first_wins, regulariser
        ) > loss - length * decrement / 2 + 1e-12 * (1 + abs(loss)):
            length /= 2
        theta = theta - length * direction
    raise ArithmeticError(f"no maximum of the likelihood after {MOST_STEPS} Newton steps on {len(first_wins)} labels")


def norms(vectors: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """sqrt(x^T gram^-1 x) of each vector: (..., D) and (D, D) -> (...)."""
    return np.linalg.norm(_whitened(vectors, gram), axis=-1)


def distances(vectors: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """sqrt((x_i - x_j)^T gram^-1 (x_i - x_j)): (M, K, D) and (D, D) -> (M, K, K), zero on the diagonal."""
    white = _whitened(vectors, gram)
    inner = white @ white.transpose(0, 2, 1)
    own = np.diagonal(inner, axis1=1, axis2=2)
    squared = np.maximum(own[:, :, None] + own[:, None, :] - 2 * inner, 0)
    every = np.arange(vectors.shape[1])
    squared[:, every, every] = 0
    return np.sqrt(squared)


def _whitened(vectors: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """L^-1 x with gram = L L^T, so that the plain norm of the result is the norm in gram^-1."""
    flat = vectors.reshape(-1, vectors.shape[-1])
    return solve_triangular(cholesky(gram, lower=True), flat.T, lower=True).T.reshape(vectors.shape)


class PairwiseLogistic:
    """The labels bought so far, their design matrix, and the estimate.

    Args:
        size: D.
        regulariser: lambda, above 0; without it the estimate would not exist before D labels, nor for labels that a
            linear utility separates.
    """

    def __init__(self, size: int, regulariser: float) -> None:
        if not regulariser > 0:
            raise ValueError(f"regulariser: expected a number above 0, got {regulariser!r}")
        self.regulariser = regulariser
        self.theta = np.zeros(size)
        """The estimate of the last `add`, (D,)."""
        self.gram = regulariser * np.eye(size)
        """regulariser I + sum_t z_t z_t^T, (D, D): what the papers call V or M."""
        self._differences, self._first_wins = np.empty((64, size)), np.empty(64)
        self.count = 0
        """T, labels so far."""

    @property
    def differences(self) -> np.ndarray:
        """z, (T, D)."""
        return self._differences[: self.count]

    @property
    def first_wins(self) -> np.ndarray:
        """y, (T,)."""
        return self._first_wins[: self.count]

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the labels under the estimate, in nats, without the regulariser."""
        total = regularised_loss(self.theta, self.differences, self.first_wins, 0.0)
        return total / self.count if self.count else float(np.log(2))

    def add(self, differences: np.ndarray, first_wins: np.ndarray) -> int:
        """Takes labels in, (n, D) and (n,), and fits anew from the last estimate; returns the Newton steps it took."""
        count = self.count + len(differences)
        while count > len(self._differences):  # doubled, so that a label is copied a constant number of times
            self._differences = np.concatenate([self._differences, np.empty_like(self._differences)])
            self._first_wins = np.concatenate([self._first_wins, np.empty_like(self._first_wins)])
        self._differences[self.count : count] = differences
        self._first_wins[self.count : count] = first_wins
        self.count = count
        self.gram += differences.T @ differences
        self.theta, steps = fit(self.differences, self.first_wins, self.regulariser, self.theta)
        return steps

    def curvature(self) -> np.ndarray:
        """The Hessian at the estimate, (D, D): the precision of the Laplace approximation to the posterior."""
        return hessian(self.theta, self.differences, self.regulariser)

    def save(self, path: Path) -> None:
        """Writes the labels, the design matrix and the estimate."""
        tensors = {"differences": self.differences, "first_wins": self.first_wins}
        tensors |= {"gram": self.gram, "theta": self.theta}
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)

    def load(self, path: Path) -> None:
        """Restores what `save` wrote, bit for bit."""
        tensors = {name: value.copy() for name, value in load_file(path).items()}  # its own are views of the file
        self.gram, self.theta = tensors["gram"], tensors["theta"]
        self._differences, self._first_wins = tensors["differences"], tensors["first_wins"]
        self.count = len(self._first_wins)
        if not self.count:  # doubling needs something to double
            self._differences, self._first_wins = np.empty((64, len(self.theta))), np.empty(64)
