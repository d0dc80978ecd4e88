import numpy as np
import pytest
from scipy.special import expit

from llm_duel_env.metrics import duel_metrics, evaluate, evaluate_prompts, hard, summarise
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
