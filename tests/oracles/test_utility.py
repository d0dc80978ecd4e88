import numpy as np
import pytest

from llm_duel_env.oracles.base import Oracle, OracleError
from llm_duel_env.oracles.checked import checked_utility, checked_win_probability, compare
from llm_duel_env.oracles.utility import UtilityOracle

PROMPTS = {"prompt_id": np.array([4, 7])}
UTILITY = np.array([0.0, 1.0, 3.0])


def test_bradley_terry_with_a_scale():
    oracle = UtilityOracle(lambda prompts, r: UTILITY[r], scale=2.0)
    p = oracle.win_probability(PROMPTS, np.array([1, 0]), np.array([0, 2]))
    assert p == pytest.approx([1 / (1 + np.exp(-2)), 1 / (1 + np.exp(6))])
    assert oracle.utility(PROMPTS, np.array([1, 2])).tolist() == [2, 6]
    assert oracle.has_utility
    for scale in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive"):
            UtilityOracle(lambda prompts, r: r, scale=scale)


def test_extreme_utilities_do_not_overflow():
    with np.errstate(all="raise"):
        p = UtilityOracle(lambda prompts, r: 1e6 * r).win_probability(PROMPTS, np.array([1, 0]), np.array([0, 1]))
    assert p.tolist() == [1, 0]


class Says(Oracle):
    has_utility = True

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def win_probability(self, prompts, first, second):
        self.asked += [int(i) for i in prompts["prompt_id"]]
        return self.answer

    def utility(self, prompts, responses):
        return self.answer


@pytest.mark.parametrize(
    "bad", [[0.5], [0.5] * 3, [[0.5, 0.5]], 0.5, None, ["a", "b"], [float("nan"), 0.5], [0, np.inf]]
)
def test_unusable_answers_are_refused(bad):
    with pytest.raises(OracleError, match="Says"):
        checked_win_probability(Says(bad), PROMPTS, np.array([0, 1]), np.array([1, 0]))
    with pytest.raises(OracleError, match="Says"):
        checked_utility(Says(bad), PROMPTS, np.array([0, 1]))


@pytest.mark.parametrize("bad", [[0.5, 1.01], [0.5, -1e-9]])
def test_probabilities_stay_in_their_range(bad):
    with pytest.raises(OracleError, match="for prompt 7"):
        checked_win_probability(Says(bad), PROMPTS, np.array([0, 1]), np.array([1, 0]))
    assert checked_utility(Says(bad), PROMPTS, np.array([0, 1])).tolist() == bad


def test_identical_responses_tie_without_asking():
    oracle = Says([1.0])
    assert compare(oracle, PROMPTS, np.array(["a", "é"], object), np.array(["a", "e"], object)).tolist() == [0.5, 1]
    assert oracle.asked == [7]
    assert compare(oracle, PROMPTS, np.array([1, 1]), np.array([1, 1])).tolist() == [0.5, 0.5]
    assert oracle.asked == [7]
