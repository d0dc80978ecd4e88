import numpy as np
import pytest

from llm_duel_env.oracles.base import OracleError
from llm_duel_env.tasks.synthetic import Synthetic, dissimilarity_correlation_of

SMALL = {"candidates": 16, "train_prompts": 96, "heldout_prompts": 32}


@pytest.fixture(scope="module")
def task():
    return Synthetic(**SMALL)


def every(task):
    """Utilities of all candidates of all prompts, (P, K), through the oracle."""
    total = task.train_prompts + task.heldout_prompts
    ids, responses = np.repeat(np.arange(total), task.candidates), np.tile(np.arange(task.candidates), total)
    return task.oracle.utility(task.observe(ids), responses).reshape(total, -1)


def test_observations_fit_their_space(task):
    observation = task.observe(np.array([5, 0, 127, 5]))
    assert observation["context"].shape == (4, 8)
    assert observation["candidates"].shape == (4, 16, 8)
    for row in range(4):
        assert task.observation_space.contains({name: value[row] for name, value in observation.items()})
    np.testing.assert_array_equal(observation["candidates"][0], observation["candidates"][3])


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_utility_is_standardised_within_every_prompt(std):
    utilities = every(Synthetic(**SMALL, utility_std=std))
    np.testing.assert_allclose(utilities.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(utilities.std(axis=1), std, rtol=1e-12)


def test_optimum_is_the_best_candidate_in_the_oracle_s_logits():
    task = Synthetic(**SMALL, oracle_scale=0.5)
    np.testing.assert_array_equal(task.optimum(task.heldout_ids), every(task)[96:].max(axis=1))
    assert every(task).std() == pytest.approx(1.0)  # 2 logits, halved by the oracle's scale
    observation, zero, one = task.observe(np.arange(8)), np.zeros(8, int), np.ones(8, int)
    gap = task.utility(observation, zero) - task.utility(observation, one)
    np.testing.assert_allclose(task.oracle.win_probability(observation, zero, one), 1 / (1 + np.exp(-0.5 * gap)))


def test_utility_depends_on_the_context(task):
    """The same candidate is good for one prompt and bad for another: no ranking of candidates alone would do."""
    substance = np.broadcast_to(task.observe(np.array([0]))["candidates"][:, :, :4], (96, 16, 4))
    utilities = task._utility(task.observe(np.arange(96))["context"], substance)
    correlation = np.corrcoef(utilities)
    assert np.abs(correlation[np.triu_indices(96, 1)]).mean() < 0.7
    assert correlation.min() < -0.8


def test_utility_is_a_function_of_context_and_candidate(task):
    """What an agent sees determines utility: recomputed from the observation it is the oracle's."""
    observation = task.observe(np.arange(20))
    again = task._utility(observation["context"], observation["candidates"][:, :, :4])
    np.testing.assert_allclose(again, every(task)[:20], rtol=1e-4, atol=1e-4)


def test_task_seed_is_the_world(task):
    again, other = Synthetic(**SMALL), Synthetic(**SMALL, task_seed=1)
    np.testing.assert_array_equal(every(task), every(again))
    np.testing.assert_array_equal(task.reference(np.arange(128)), again.reference(np.arange(128)))
    assert not np.allclose(every(task), every(other))


def test_references_are_uniform_and_do_not_depend_on_their_batch():
    task = Synthetic(candidates=4, train_prompts=3900, heldout_prompts=100)
    reference = task.reference(np.arange(4000))
    assert (np.bincount(reference, minlength=4) / 4000).tolist() == pytest.approx([0.25] * 4, abs=0.03)
    assert task.reference(np.array([77]))[0] == reference[77]


def test_dissimilarity_knob_is_met_and_monotone():
    knob = [-1.0, -0.1, 0.0, 0.3, 0.6, 1.0]
    measured = []
    for wanted in knob:
        task = Synthetic(train_prompts=256, heldout_prompts=256, dissimilarity_correlation=wanted)
        fresh = task.observe(task.heldout_ids)  # prompts that the layout was not fitted on
        utilities = task._utilities[task.heldout_ids]
        measured.append(dissimilarity_correlation_of(fresh["candidates"], utilities))
        assert measured[-1] == pytest.approx(task.dissimilarity_correlation, abs=0.03)
    assert measured == sorted(measured)
    assert measured[0] < -0.12
    assert measured[1:5] == pytest.approx(knob[1:5], abs=0.03)
    assert measured[5] > 0.85


@pytest.mark.parametrize("wanted", [-1.0, 0.0, 1.0])
def test_style_says_nothing_about_how_good_a_candidate_is(wanted):
    task = Synthetic(train_prompts=512, heldout_prompts=1, dissimilarity_correlation=wanted)
    style = task.observe(np.arange(512))["candidates"][:, :, 4:].reshape(-1, 4)
    utilities = task._utilities[:512].ravel()
    for values in (*style.T, np.linalg.norm(style, axis=1)):
        assert abs(np.cov(values, utilities)[0, 1]) < 0.3  # about 3 if every prompt had the same arc
    np.testing.assert_allclose(np.linalg.norm(style, axis=1), 4.0, rtol=1e-5)


def test_correlation_against_a_loop_over_pairs():
    draw = np.random.default_rng(0)
    vectors, utilities = draw.standard_normal((3, 5, 4)), draw.standard_normal((3, 5))
    dissimilarity, gap = [], []
    for m in range(3):
        for i in range(5):
            for j in range(i):
                a, b = vectors[m, i], vectors[m, j]
                dissimilarity.append(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
                gap.append(abs(utilities[m, i] - utilities[m, j]))
    assert dissimilarity_correlation_of(vectors, utilities) == pytest.approx(np.corrcoef(dissimilarity, gap)[0, 1])


def test_intransitive_preferences_have_cycles_and_no_utility():
    task = Synthetic(**SMALL, preferences="intransitive")
    assert task.truth is None
    assert task.optimum(np.arange(3)) is None
    assert not task.oracle.has_utility
    with pytest.raises(OracleError):
        task.oracle.utility(task.observe(np.arange(1)), np.zeros(1, int))
    cycles = 0
    for prompt in range(8):
        beats = task.oracle.matrix(prompt) > 0.5
        cycles += int(np.trace(np.linalg.matrix_power(beats.astype(int), 3))) // 3
    assert cycles > 50


def test_view_refuses_held_out_prompts(task):
    view = task.view()
    assert view.observe(np.array([95]))["prompt_id"].tolist() == [95]
    with pytest.raises(ValueError, match=r"\[0, 96\)"):
        view.observe(np.array([96]))


def test_refusals():
    for wrong in ({"candidates": 1}, {"candidate_dim": 3}, {"heldout_prompts": 0}):
        with pytest.raises(ValueError, match="candidate_dim >= 4"):
            Synthetic(**wrong)
    for wrong in ({"utility_std": 0.0}, {"oracle_scale": -1.0}, {"dissimilarity_correlation": 1.5}):
        with pytest.raises(ValueError, match=r"in \[-1, 1\]"):
            Synthetic(**wrong)
    with pytest.raises(ValueError, match="'cyclic'"):
        Synthetic(preferences="cyclic")


@pytest.mark.parametrize("setting", [{"candidates": 2.5}, {"candidate_dim": "8"}, {"utility_std": float("inf")}])
def test_settings_of_the_wrong_kind_are_refused(setting):
    with pytest.raises(ValueError, match=f"(?s){next(iter(setting))}.*got|expected finite utility_std"):
        Synthetic(**{"train_prompts": 8, "heldout_prompts": 4, **setting})
