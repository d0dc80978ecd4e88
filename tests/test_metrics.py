import numpy as np
import pytest
from scipy.optimize import root
from scipy.special import expit

from llm_duel_env.metrics import duel_metrics, evaluate, evaluate_prompts, hard, length_controlled, summarise
from llm_duel_env.oracles.base import OracleError
from llm_duel_env.oracles.matrix import MatrixOracle
from llm_duel_env.oracles.utility import UtilityOracle


def test_hard_counts_a_tie_half():
    assert hard(np.array([0.51, 0.5, 0.49])).tolist() == [1, 0.5, 0]
    assert np.isnan(hard(np.array([np.nan]))).all()


def test_duel_metrics_by_hand(finite_task):
    task = finite_task(candidates=3)
    task.utilities[:] = [0.0, 1.0, 3.0]
    got = duel_metrics(task, task.observe(np.array([2, 4])), np.array([1, 0]), np.array([2, 2]))
    assert got["online_win_probability"] == pytest.approx([(expit(1) + expit(3)) / 2, (0.5 + expit(3)) / 2])
    assert got["online_win_rate"].tolist() == [1, 0.75]
    assert got["regret"] == pytest.approx([expit(2) + 0.5 - 1, expit(3) + 0.5 - 1])
    assert got["utility_regret"] == pytest.approx([1.0, 1.5])
    assert got["utility_first"].tolist() == [1, 0]
    assert got["utility_second"].tolist() == [3, 3]


def test_no_regret_for_the_best_pair_and_never_less(finite_task):
    task = finite_task()
    prompts = task.observe(np.arange(7))
    best = task.utilities[:7].argmax(axis=1)
    got = duel_metrics(task, prompts, best, best)
    assert got["regret"] == pytest.approx(np.zeros(7))
    assert got["utility_regret"] == pytest.approx(np.zeros(7))
    for other in range(5):
        assert (duel_metrics(task, prompts, best, np.full(7, other))["regret"] >= -1e-12).all()


def test_the_true_utility_comes_before_the_oracles(finite_task):
    task = finite_task()
    task.truth = UtilityOracle(lambda prompts, r: 10.0 + r)
    task.optimum = lambda ids: np.full(len(ids), 14.0)
    got = duel_metrics(task, task.observe(np.array([0])), np.array([3]), np.array([4]))
    assert (got["utility_first"][0], got["utility_second"][0]) == (13, 14)
    assert got["regret"][0] == pytest.approx(expit(1.0) - 0.5)
    assert got["online_win_probability"][0] != pytest.approx((expit(3) + expit(4)) / 2)  # still the oracle's


def test_an_intransitive_oracle_is_measured_against_the_von_neumann_winner(finite_task):
    rock_paper_scissors = np.array([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])
    task = finite_task(candidates=3, oracle=MatrixOracle(rock_paper_scissors))
    got = duel_metrics(task, task.observe(np.array([0, 1])), np.array([0, 1]), np.array([1, 2]))
    assert got["regret"] == pytest.approx([0, 0])
    assert np.isnan(got["utility_regret"]).all()
    assert np.isnan(got["utility_first"]).all()
    beaten = np.array([[0.5, 0.9, 0.8], [0.1, 0.5, 1.0], [0.2, 0.0, 0.5]])  # 0 beats both
    task = finite_task(candidates=3, oracle=MatrixOracle(beaten))
    got = duel_metrics(task, task.observe(np.array([0])), np.array([1]), np.array([2]))
    assert got["regret"] == pytest.approx([0.9 + 0.8 - 1])


def test_what_is_not_known_is_nan(text_task, counting_oracle):
    task = text_task(no_reference=True, oracle=counting_oracle())
    got = duel_metrics(task, task.observe(np.array([0])), np.array(["a"], object), np.array(["b"], object))
    assert all(np.isnan(value).all() for value in got.values())
    assert task.oracle.calls == 0


def test_one_missing_reference_leaves_the_others_known(text_task):
    task = text_task()
    task.reference = lambda ids: np.array([None if i in (1, 6) else "référence" for i in ids], object)
    longer, shorter = np.array(["a longer one"] * 3, object), np.array(["short"] * 3, object)
    got = duel_metrics(task, task.observe(np.array([0, 1, 2])), longer, shorter)
    assert got["online_win_rate"].tolist() == pytest.approx([0.5, np.nan, 0.5], nan_ok=True)
    means = evaluate(task, lambda prompts: longer)
    assert means["offline_win_rate"] == 1.0  # over the two held-out prompts that have a reference


def test_evaluation_on_heldout_prompts(finite_task):
    task = finite_task()
    seen = []

    def respond(prompts):
        seen.extend(prompts["prompt_id"])
        return [1, 2, 0]

    rows = evaluate_prompts(task, respond)
    assert seen == [7, 8, 9]
    utility = task.utilities[[7, 8, 9], [1, 2, 0]]
    probability = expit(utility - task.utilities[7:, 0])
    assert rows["offline_win_probability"] == pytest.approx(probability)
    assert rows["offline_win_rate"].tolist() == hard(probability).tolist()
    assert rows["offline_win_rate"][2] == 0.5  # the reference itself
    best = task.utilities[7:].max(axis=1)
    means = evaluate(task, respond)
    assert means["true_utility"] == pytest.approx(utility.mean())
    assert means["simple_regret"] == pytest.approx((best - utility).mean())
    assert means["optimum_share"] == pytest.approx(utility.mean() / best.mean())
    assert means == summarise(rows)
    assert "response_words" not in means


def test_evaluation_takes_the_first_prompts_and_counts_words(text_task):
    task = text_task()
    means = evaluate(task, lambda prompts: ["zwei Wörter", "one"], prompts=2)
    assert means["response_words"] == 1.5
    assert means["offline_win_rate"] == 0.5  # longer and shorter than the reference
    assert np.isnan(means["simple_regret"])
    for prompts in (0, 4):
        with pytest.raises(ValueError, match="1 to 3 held-out"):
            evaluate(task, lambda prompts: ["a"], prompts=prompts)


@pytest.mark.parametrize("responses", [["a", "b"], ["a", "b", ""], ["a", "b", 3], ["a", "b", "\ud800"]])
def test_evaluation_refuses_what_is_no_response(text_task, responses):
    with pytest.raises(ValueError, match="respond: expected"):
        evaluate(text_task(), lambda prompts: responses)


def test_evaluation_refuses_an_unusable_oracle(text_task, counting_oracle):
    task = text_task(oracle=counting_oracle(lambda m: np.full(m, np.nan)))
    with pytest.raises(OracleError, match="nan"):
        evaluate(task, lambda prompts: ["a", "b", "c"])


def test_evaluation_measures_lengths_against_the_reference(text_task):
    task = text_task()
    task.reference = lambda ids: np.array([None if i == 6 else "12345" for i in ids], object)
    rows = evaluate_prompts(task, lambda prompts: ["1234567", "x", "猫"])
    assert rows["length_difference"].tolist() == pytest.approx([2, np.nan, -4], nan_ok=True)
    assert summarise(rows)["length_difference"] == -1


def test_the_truth_judges_too_where_it_is_another(finite_task):
    task = finite_task()
    assert "true_win_rate" not in evaluate_prompts(task, lambda prompts: [1, 2, 3])
    task.truth = UtilityOracle(lambda prompts, r: -task.utilities[prompts["prompt_id"], r])
    rows = evaluate_prompts(task, lambda prompts: [1, 2, 0])
    assert rows["true_win_probability"] == pytest.approx(1 - rows["offline_win_probability"])
    assert rows["true_win_rate"].tolist() == (1 - rows["offline_win_rate"]).tolist()
    task.truth = task.oracle
    assert "true_win_rate" not in evaluate_prompts(task, lambda prompts: [1, 2, 3])


def lengths_and_wins(length_effect, count=4000):
    draw = np.random.default_rng(0)
    difference = draw.normal(3.0, 5.0, count).round()
    chance = expit(0.4 + length_effect * np.tanh(difference / difference.std(ddof=1)))
    return (draw.random(count) < chance).astype(float), difference


def test_the_length_controlled_win_rate_takes_out_what_length_did():
    wins, difference = lengths_and_wins(length_effect=2.0)
    assert wins.mean() > 0.68  # most responses are longer, and longer ones win
    assert length_controlled(wins, difference) == pytest.approx(expit(0.4), abs=0.025)
    wins, difference = lengths_and_wins(length_effect=0.0)
    assert length_controlled(wins, difference) == pytest.approx(wins.mean(), abs=0.015)


def test_the_length_controlled_win_rate_solves_alpacaevals_regression():
    """Against the score equations of the logistic regression, solved by other means; ties count half."""
    draw = np.random.default_rng(1)
    wins, difference = draw.choice([0.0, 0.5, 1.0], 60, p=[0.3, 0.1, 0.6]), draw.normal(2.0, 9.0, 60)
    x = np.tanh(difference / np.std(difference, ddof=1))

    def score(weights):
        residual = expit(weights[0] + weights[1] * x) - wins
        return [residual.sum(), residual @ x + 0.01 * weights[1]]

    solved = root(score, [0.0, 0.0])
    assert solved.success
    assert length_controlled(wins, difference) == pytest.approx(expit(solved.x[0]), abs=1e-4)


def test_the_length_controlled_win_rate_in_corners():
    assert length_controlled(np.ones(8), np.arange(8.0)) == 1.0
    assert length_controlled(np.array([1.0, 0.0, 1.0]), np.zeros(3)) == pytest.approx(2 / 3)
    assert np.isnan(length_controlled(np.array([1.0, 0.0]), np.array([4.0, 4.0])))  # which of the two is not known
    assert np.isnan(length_controlled(np.array([np.nan]), np.array([1.0])))
    told = length_controlled(np.array([1.0, 1.0, 0.0, 0.0, np.nan]), np.array([1.0, 3.0, -1.0, -3.0, 5.0]))
    assert told == pytest.approx(0.5, abs=1e-3)  # length tells every win
    with pytest.raises(ValueError, match="two vectors"):
        length_controlled(np.zeros(2), np.zeros(3))
