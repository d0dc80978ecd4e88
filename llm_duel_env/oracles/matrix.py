"""An oracle made of a table of win probabilities, which need not follow from any utility: it may be intransitive."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import linprog

from llm_duel_env.oracles.base import Oracle, OracleError
from llm_duel_env.types import Observation


class MatrixOracle(Oracle):
    """Preferences on a finite task, read from a (K, K) matrix: entry [i, j] is P(response i beats response j)."""

    def __init__(self, matrix: np.ndarray | Callable[[int], np.ndarray]) -> None:
        """An oracle that looks preferences up.

        Args:
            matrix: (K, K), the same for every prompt; or (P, K, K), one for each prompt id; or a function from a
                prompt id to a (K, K) matrix.

        Raises:
            ValueError: a matrix that is not square, not in [0, 1], or where P(i beats j) + P(j beats i) is not 1.
        """
        self._matrix: np.ndarray | Callable[[int], np.ndarray] = matrix
        if not callable(matrix):
            self._matrix = np.array(matrix, np.float64)
            if self._matrix.ndim not in (2, 3):
                raise ValueError(f"matrix: expected shape (K, K) or (P, K, K), got {self._matrix.shape}")
            for table in self._matrix.reshape(-1, *self._matrix.shape[-2:]):
                _check(table)
        self._sound: set[int] = set()
        """Prompts whose matrix was checked."""
        self._lost: dict[int, np.ndarray] = {}
        """Prompt -> P(the von Neumann winner beats each response), (K,)."""

    def matrix(self, prompt_id: int) -> np.ndarray:
        """The preference matrix of a prompt: (K, K) float64."""
        if callable(self._matrix):
            table = np.asarray(self._matrix(prompt_id), np.float64)
            if prompt_id not in self._sound:
                _check(table)
                self._sound.add(prompt_id)
            return table
        if self._matrix.ndim == 2:
            return self._matrix
        if not 0 <= prompt_id < len(self._matrix):
            raise OracleError(f"prompt id: expected 0 to {len(self._matrix) - 1}, got {prompt_id}")
        return self._matrix[prompt_id]

    def win_probability(self, prompts: Observation, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """P(first beats second): float64 (M,)."""
        rows = zip(prompts["prompt_id"], first, second, strict=True)
        return np.array([self.matrix(int(prompt))[i, j] for prompt, i, j in rows], np.float64)

    def winner(self, prompt_id: int) -> np.ndarray:
        """The von Neumann winner of a prompt: the mixture (K,) that no response beats more often than not."""
        return von_neumann_winner(self.matrix(prompt_id))

    def optimal_win_probability(self, prompts: Observation, responses: np.ndarray) -> np.ndarray:
        """P(the von Neumann winner beats the response): float64 (M,), at least 1/2 for every response."""
        rows = zip(map(int, prompts["prompt_id"]), responses, strict=True)
        return np.array([self._winner_beats(prompt)[i] for prompt, i in rows], np.float64)

    def _winner_beats(self, prompt_id: int) -> np.ndarray:
        shared = not callable(self._matrix) and self._matrix.ndim == 2
        key = -1 if shared else prompt_id
        if key not in self._lost:
            self._lost[key] = self.winner(prompt_id) @ self.matrix(prompt_id)
        return self._lost[key]


def von_neumann_winner(matrix: np.ndarray) -> np.ndarray:
    """The mixture (K,) over responses that maximises its smallest win probability under `matrix` (K, K).

    By the minimax theorem that smallest win probability is 1/2. Dominated responses have no weight in it, so the linear
    program is over the others alone: of 64 candidates a handful, or one.

    Example:
        >>> rock_paper_scissors = np.array([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])
        >>> von_neumann_winner(rock_paper_scissors).round(6).tolist()
        [0.333333, 0.333333, 0.333333]
    """
    kept = undominated(_check(matrix))
    winner = np.zeros(len(matrix))
    winner[kept] = _solve(matrix[np.ix_(kept, kept)]) if len(kept) > 1 else 1.0
    return winner


def undominated(matrix: np.ndarray) -> np.ndarray:
    """The responses that are left when those are taken away, again and again, that another one surpasses against each
    response that is left: their numbers, ascending."""
    kept = np.arange(len(matrix))
    while True:
        table = matrix[np.ix_(kept, kept)]
        dominated = np.array([(table > row).all(axis=1).any() for row in table])
        if not dominated.any():
            return kept
        kept = kept[~dominated]


def _solve(matrix: np.ndarray) -> np.ndarray:
    size = len(matrix)
    # Variables: the mixture w (K) and its value v. Maximise v subject to w @ matrix[:, j] >= v for every j.
    solution = linprog(
        c=np.append(np.zeros(size), -1.0),
        A_ub=np.hstack([-matrix.T, np.ones((size, 1))]),
        b_ub=np.zeros(size),
        A_eq=np.append(np.ones(size), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, 1)] * (size + 1),
    )
    if not solution.success:
        raise OracleError(f"the linear program of the von Neumann winner failed: {solution.message}")
    mixture = np.clip(solution.x[:size], 0, None)
    return mixture / mixture.sum()


def _check(matrix: np.ndarray) -> np.ndarray:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"matrix: expected shape (K, K), got {matrix.shape}")
    if not ((matrix >= 0) & (matrix <= 1)).all():
        raise ValueError("matrix: expected probabilities in [0, 1]")
    if not np.allclose(matrix + matrix.T, 1, rtol=0, atol=1e-9):
        raise ValueError("matrix: expected P(i beats j) + P(j beats i) = 1, so 1/2 on the diagonal")
    return matrix
