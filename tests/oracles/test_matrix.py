import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from llm_duel_env.oracles.base import OracleError
from llm_duel_env.oracles.matrix import MatrixOracle, undominated, von_neumann_winner

CYCLE = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.6], [0.8, 0.4, 0.5]])


def prompts(*ids):
    return {"prompt_id": np.array(ids)}


def test_win_probability_looks_up_the_prompts_own_matrix():
    oracle = MatrixOracle(np.stack([CYCLE, CYCLE.T]))
    assert oracle.win_probability(prompts(0, 1), np.array([0, 0]), np.array([1, 1])).tolist() == [0.9, 0.1]
    with pytest.raises(OracleError, match="0 to 1, got 2"):
        oracle.win_probability(prompts(2), np.array([0]), np.array([1]))
    by_function = MatrixOracle(lambda prompt: CYCLE if prompt == 5 else CYCLE.T)
    assert by_function.win_probability(prompts(5, 6), np.array([0, 0]), np.array([1, 1])).tolist() == [0.9, 0.1]
    assert not oracle.has_utility
    with pytest.raises(OracleError, match="no utility"):
        oracle.utility(prompts(0), np.array([0]))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.integers(0, 10_000))
def test_nothing_beats_the_von_neumann_winner(size, seed):
    upper = np.triu(np.random.default_rng(seed).random((size, size)), 1)
    matrix = upper + np.tril(1 - upper.T, -1) + np.eye(size) / 2
    winner = von_neumann_winner(matrix)
    assert winner.min() >= 0
    assert winner.sum() == pytest.approx(1)
    assert (winner @ matrix).min() >= 0.5 - 1e-7


def test_dominated_responses_are_left_out_again_and_again():
    matrix = np.array([
        [0.5, 0.9, 0.2, 0.9, 0.8],
        [0.1, 0.5, 0.6, 0.8, 0.7],
        [0.8, 0.4, 0.5, 0.9, 0.65],  # surpasses the last one everywhere, and once that is gone the one before it
        [0.1, 0.2, 0.1, 0.5, 0.95],
        [0.2, 0.3, 0.35, 0.05, 0.5],
    ])  # fmt: skip
    assert matrix == pytest.approx(1 - matrix.T)
    assert undominated(matrix).tolist() == [0, 1, 2]
    order = np.array([3, 0, 4, 2, 1])
    assert undominated(matrix[np.ix_(order, order)]).tolist() == [1, 3, 4]
    assert von_neumann_winner(matrix) == pytest.approx([0.1 / 0.8, 0.3 / 0.8, 0.4 / 0.8, 0, 0])


def test_leaving_out_the_dominated_changes_no_winner():
    """Against a linear program over all responses, of matrices with many dominated ones."""
    for seed in range(20):
        draw = np.random.default_rng(seed)
        utility, angle = draw.normal(size=20) * 2, draw.uniform(0, 2 * np.pi, 20)
        gap = np.subtract.outer(utility, utility) + 2 * np.sin(np.subtract.outer(angle, angle))
        matrix = 1 / (1 + np.exp(-gap))
        solved = linprog(
            np.append(np.zeros(20), -1.0),
            A_ub=np.hstack([-matrix.T, np.ones((20, 1))]),
            b_ub=np.zeros(20),
            A_eq=[[*np.ones(20), 0.0]],
            b_eq=[1.0],
        )
        assert len(undominated(matrix)) < 20
        assert von_neumann_winner(matrix) == pytest.approx(solved.x[:20], abs=1e-9)


def test_a_condorcet_winner_is_the_von_neumann_winner():
    utility = np.array([0.3, 2.0, -1.0, 1.9])
    matrix = 1 / (1 + np.exp(utility[None] - utility[:, None]))
    assert von_neumann_winner(matrix).round(9).tolist() == [0, 1, 0, 0]
    oracle = MatrixOracle(matrix)
    assert oracle.optimal_win_probability(prompts(3, 4), np.array([1, 2])) == pytest.approx([0.5, matrix[1, 2]])


def test_a_cycle_has_a_mixed_winner_solved_by_hand():
    # The margins above 1/2 are .4, .1 and .3; the mixture gives each response the margin of the pair it is not in.
    assert von_neumann_winner(CYCLE) == pytest.approx(np.array([0.1, 0.3, 0.4]) / 0.8)
    oracle = MatrixOracle(CYCLE)
    assert oracle.optimal_win_probability(prompts(0, 0, 0), np.arange(3)) == pytest.approx(np.full(3, 0.5))


@pytest.mark.parametrize(
    "bad", [np.full((2, 3), 0.5), np.full(4, 0.5), np.array([[0.5, 0.7], [0.7, 0.5]]), np.array([[1, 2], [-1, 0.5]])]
)
def test_what_is_no_preference_matrix_is_refused(bad):
    with pytest.raises(ValueError, match="matrix: expected"):
        MatrixOracle(bad)
