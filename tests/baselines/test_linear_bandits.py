"""The linear dueling bandits: estimate, widths, selection rules, and what they are refused."""

import itertools

import gymnasium
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

import llm_duel_env  # noqa: F401
from llm_duel_env.baselines.linear_bandits import most_informative_pair, optimistic_pair, thompson_pair
from llm_duel_env.baselines.pairwise_logistic import (
    PairwiseLogistic,
    distances,
    fit,
    hessian,
    norms,
    regularised_loss,
)
from llm_duel_env.benchmark.recipes import recipe_of
from llm_duel_env.benchmark.registry import load_agent
from llm_duel_env.tasks import make_task

NAMES = ("linear_ts", "max_inp", "colstim")
SMALL = {"candidates": 12, "train_prompts": 200, "heldout_prompts": 40}


def labels(count=60, size=7, seed=0, steep=1.0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(count, size))
    return z, (rng.random(count) < expit(steep * z @ rng.normal(size=size))).astype(float)


def build(name, seed=0, budget=40, **overrides):
    task = make_task("synthetic", **SMALL)
    agent_class = load_agent(name)
    return agent_class(task.view(), agent_class.configure(overrides), seed=seed, budget=budget), task


def play(name, rounds, *, seed=0, batch=8, agent=None, **overrides):
    env = gymnasium.make_vec("duel/Synthetic-v0", num_envs=batch, budget=1000, task_kwargs=SMALL)
    if agent is None:
        agent = build(name, seed, budget=1000, **overrides)[0]
    observation, _ = env.reset(seed=seed)
    for _ in range(rounds):
        duels = agent.act(observation)
        observation, _, _, _, info = env.step(duels.action())
        learnt = agent.update(duels.judged(info["preference"]))
    env.close()
    return agent, observation, learnt


# The estimate


@pytest.mark.parametrize("steep", [0.2, 1.0, 30.0])
@pytest.mark.parametrize("regulariser", [1e-3, 1.0, 50.0])
def test_the_estimate_is_that_of_an_independent_solver(steep, regulariser):
    z, y = labels(steep=steep)
    y[::7] = 0.5

    def loss(theta):  # written from the formula, one label at a time
        total = regulariser / 2 * sum(t * t for t in theta)
        for row, won in zip(z, y):
            chance = 1 / (1 + np.exp(-(row @ theta)))
            total -= won * np.log(chance) + (1 - won) * np.log(1 - chance)
        return total

    theta, steps = fit(z, y, regulariser, np.zeros(7))
    found = minimize(loss, np.zeros(7), method="BFGS", options={"gtol": 1e-7})
    np.testing.assert_allclose(theta, found.x, atol=2e-5 * (1 + np.abs(found.x).max()))
    assert loss(theta) == pytest.approx(regularised_loss(theta, z, y, regulariser), rel=1e-10)
    assert np.abs(z.T @ (expit(z @ theta) - y) + regulariser * theta).max() < 1e-8
    assert 1 <= steps < 30


def test_separable_labels_and_a_far_start_are_no_trouble():
    z, _ = labels(30, 5)
    y = (z[:, 0] > 0).astype(float)
    expected, _ = fit(z, y, 0.01, np.zeros(5))
    far, _ = fit(z, y, 0.01, np.full(5, 200.0))
    np.testing.assert_allclose(far, expected, atol=1e-6)


def test_the_hessian_is_the_derivative_of_the_gradient():
    z, y = labels()
    theta = np.linspace(-1, 1, 7)

    def gradient(at):
        return z.T @ (expit(z @ at) - y) + 0.3 * at

    numeric = np.stack([(gradient(theta + e) - gradient(theta - e)) / 2e-6 for e in 1e-6 * np.eye(7)])
    np.testing.assert_allclose(hessian(theta, z, 0.3), numeric, rtol=1e-6, atol=1e-8)


def test_labels_in_parts_are_labels_at_once():
    z, y = labels(300)
    model = PairwiseLogistic(7, 0.5)
    for rows in np.array_split(np.arange(300), 17):
        model.add(z[rows], y[rows])
    np.testing.assert_allclose(model.theta, fit(z, y, 0.5, np.zeros(7))[0], atol=1e-9)
    np.testing.assert_allclose(model.gram, 0.5 * np.eye(7) + sum(np.outer(row, row) for row in z), rtol=1e-12)
    np.testing.assert_array_equal(model.differences, z)
    chance = expit(z @ model.theta)
    assert model.loss == pytest.approx(-np.mean(y * np.log(chance) + (1 - y) * np.log(1 - chance)))


def test_a_regulariser_of_nought_is_refused():
    with pytest.raises(ValueError, match="expected a number above 0, got 0"):
        PairwiseLogistic(3, 0.0)


# Widths


def test_widths_are_the_quadratic_forms_of_the_inverse():
    rng = np.random.default_rng(1)
    x, a = rng.normal(size=(3, 5, 4)), rng.normal(size=(9, 4))
    gram = 0.1 * np.eye(4) + a.T @ a
    inverse = np.linalg.inv(gram)
    length, spread = norms(x, gram), distances(x, gram)
    for m, i, j in itertools.product(range(3), range(5), range(5)):
        z = x[m, i] - x[m, j]
        assert spread[m, i, j] == pytest.approx(np.sqrt(z @ inverse @ z), abs=1e-7)
        assert length[m, i] == pytest.approx(np.sqrt(x[m, i] @ inverse @ x[m, i]))
    assert (np.diagonal(spread, axis1=1, axis2=2) == 0).all()


def test_a_duel_narrows_its_own_width():
    rng = np.random.default_rng(2)
    x, model = rng.normal(size=(1, 4, 6)), PairwiseLogistic(6, 1.0)
    before = distances(x, model.gram)[0]
    model.add((x[0, 1] - x[0, 2])[None], np.ones(1))
    after = distances(x, model.gram)[0]
    assert after[1, 2] == pytest.approx(before[1, 2] / np.sqrt(1 + before[1, 2] ** 2))  # Sherman-Morrison
    assert (after <= before + 1e-12).all()


# Selection rules, by brute force


def small_case(seed, m=20, k=5):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(m, k, 3))
    gram = np.eye(3) + 3 * np.outer([1.0, 0.5, 0], [1.0, 0.5, 0])
    return rng, x, x @ rng.normal(size=3), norms(x, gram), distances(x, gram)


@pytest.mark.parametrize("width", [1e-3, 0.3, 1.0, 50.0])
def test_the_most_informative_pair_by_brute_force(width):
    _, _, u, _, spread = small_case(0)
    first, second = most_informative_pair(u, spread, width)
    alone = 0
    for m in range(len(u)):
        promising = [a for a in range(5) if all(u[m, a] - u[m, b] + width * spread[m, a, b] >= 0 for b in range(5))]
        assert int(u[m].argmax()) in promising
        pairs = [(a, b) for a in promising for b in promising if a != b]
        if not pairs:
            alone += 1
            pairs = [(promising[0], b) for b in range(5) if b != promising[0]]
        assert spread[m, first[m], second[m]] == pytest.approx(max(spread[m, a, b] for a, b in pairs))
        assert (first[m], second[m]) in pairs
    assert (alone == len(u)) == (width == 1e-3)
    if width == 50.0:  # everybody is promising: the widest pair of all
        np.testing.assert_allclose(spread[np.arange(len(u)), first, second], spread.max(axis=(1, 2)))


@pytest.mark.parametrize("width", [0.0, 0.3, 20.0])
def test_the_optimistic_pair_by_brute_force(width):
    rng, _, u, length, spread = small_case(1)
    noise = rng.gumbel(size=u.shape)
    first, second = optimistic_pair(u, length, spread, noise, width)
    for m in range(len(u)):
        champion = max(range(5), key=lambda a: u[m, a] + noise[m, a] * length[m, a])
        rival = max(set(range(5)) - {champion}, key=lambda b: u[m, b] - u[m, champion] + width * spread[m, b, champion])
        assert (first[m], second[m]) == (champion, rival)


def test_the_thompson_pair_by_brute_force():
    rng, x, *_ = small_case(2)
    one, two = rng.normal(size=(2, len(x), 3))
    one[:5] = two[:5]  # the same draw twice still makes a duel
    first, second = thompson_pair(x, one, two)
    for m in range(len(x)):
        best = max(range(5), key=lambda a: x[m, a] @ one[m])
        assert first[m] == best
        assert second[m] == max(set(range(5)) - {best}, key=lambda a: x[m, a] @ two[m])


def test_no_rule_duels_a_candidate_with_itself_even_where_all_are_equal():
    for k in (2, 3):
        x, u = np.zeros((4, k, 3)), np.zeros((4, k))
        spread, length = distances(x, np.eye(3)), norms(x, np.eye(3))
        for first, second in (
            most_informative_pair(u, spread, 1.0),
            optimistic_pair(u, length, spread, u, 1.0),
            thompson_pair(x, np.zeros((4, 3)), np.zeros((4, 3))),
        ):
            assert (first != second).all()
            assert (np.maximum(first, second) < k).all()


# The agents


@pytest.mark.parametrize("name", NAMES)
def test_the_policy_network_is_never_touched(name):
    agent, *_ = play(name, 3)
    fresh = build(name)[0].policy
    assert agent.policy.gradient_steps == 0
    for mine, theirs in zip(agent.policy.scorer.parameters(), fresh.scorer.parameters()):
        assert (mine == theirs).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_likelihood_is_that_of_the_labels_and_deployment_is_its_best(name):
    agent, observation, learnt = play(name, 5)
    assert agent.model.count == agent.queries == 40
    assert learnt["nll"] == agent.model.loss < np.log(2)
    features = agent.features(observation)
    np.testing.assert_allclose(features.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_array_equal(agent.respond(observation), (features @ agent.model.theta).argmax(axis=1))
    # The design matrix is of differences, in which centring drops out.
    duels = agent.act(observation)
    rows, pair = np.arange(len(features)), duels.pair.responses
    before = agent.model.gram.copy()
    agent.update(duels.judged(np.ones(len(rows))))
    z = features[rows, pair[:, 0]] - features[rows, pair[:, 1]]
    np.testing.assert_allclose(agent.model.gram - before, z.T @ z, atol=1e-6)


def test_ties_count_and_pairs_without_a_label_do_not():
    agent, task = build("max_inp")
    duels = agent.act(task.observe(np.arange(4)))
    agent.update(duels.judged(np.array([1.0, 0.5, np.nan, 0.0])))
    assert agent.model.first_wins.tolist() == [1.0, 0.5, 0.0]
    assert agent.update(duels.judged(np.full(4, np.nan))) == {}


def test_thompson_draws_have_the_posterior_s_mean_and_spread():
    """Over many prompts with the same candidates, the champion's share is that of draws from N(theta, H^-1)."""
    agent, *_ = play("linear_ts", 6)
    task = make_task("synthetic", **SMALL)
    one = task.observe(np.zeros(4000, np.int64))
    many = {**one, "prompt_id": np.arange(4000)}
    first = agent.act(many).pair.responses[:, 0]
    shares = np.bincount(first, minlength=12) / 4000
    rng = np.random.default_rng(0)
    covariance = np.linalg.inv(agent.model.curvature())
    thetas = rng.multivariate_normal(agent.model.theta, covariance, size=20000)
    expected = np.bincount((thetas @ agent.features(one)[0].T).argmax(axis=1), minlength=12) / 20000
    assert np.abs(shares - expected).max() < 0.03  # three standard errors
    assert (shares > 0.02).sum() > 1


def test_colstim_s_perturbations_are_clipped_gumbels_that_couple_as_told():
    agent, task = build("colstim")
    observation = task.observe(np.arange(200))
    assert (np.ptp(agent.perturbations(observation, 12), axis=1) == 0).all()  # D log(D T) is far above sqrt(t)
    agent, _ = build("colstim", coupling=0.0)
    noise = agent.perturbations(observation, 12)
    assert np.ptp(noise, axis=1).min() > 0
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.1)
    assert noise.std() == pytest.approx(np.pi / np.sqrt(6), abs=0.1)
    agent, _ = build("colstim", coupling=0.0, scale=0.02)
    assert np.abs(agent.perturbations(observation, 12)).max() == pytest.approx(0.02 * agent.confidence)
    agent, _ = build("colstim", coupling=0.5 / (80 * np.log(80 * 40)))
    assert 0.35 < (np.ptp(agent.perturbations(observation, 12), axis=1) == 0).mean() < 0.65


def test_a_prompt_that_comes_twice_in_a_round_has_draws_of_its_own():
    agent, task = build("linear_ts")
    draws = agent.draws("theta", task.observe(np.array([3, 5, 3])), 6)
    assert (draws[0] != draws[2]).all()
    np.testing.assert_array_equal(draws[:1], agent.draws("theta", task.observe(np.array([3])), 6))


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_go_on_exactly(name, tmp_path):
    agent, observation, _ = play(name, 9)
    agent.save(tmp_path)
    other, _ = build(name, budget=1000)
    other.load(tmp_path)
    for _ in range(3):
        mine, theirs = agent.act(observation), other.act(observation)
        np.testing.assert_array_equal(mine.pair.responses, theirs.pair.responses)
        label = np.arange(8) % 2.0
        assert agent.update(mine.judged(label)) == other.update(theirs.judged(label))
    np.testing.assert_array_equal(agent.model.theta, other.model.theta)
    np.testing.assert_array_equal(agent.model.gram, other.model.gram)


def test_an_agent_saved_before_its_first_label_goes_on(tmp_path):
    agent, task = build("max_inp")
    agent.save(tmp_path)
    other, _ = build("max_inp")
    other.load(tmp_path)
    duels = other.act(task.observe(np.arange(4)))
    assert other.update(duels.judged(np.ones(4)))["nll"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_text_task_is_refused_before_anything_is_spent(name, tmp_path):
    from llm_duel_env.benchmark.run_config import RunConfig
    from llm_duel_env.benchmark.runner import run

    config = RunConfig(agent=name, env="duel/TinyTLDR-v0", folder=str(tmp_path / "run"), budget=8, batch=4)
    with pytest.raises(ValueError, match=r"plays finite tasks only, and tiny_tldr is a text task"):
        run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", NAMES)
def test_learns_on_synthetic(name):
    """300 queries: the deployed response beats a uniform one clearly (uniform: 0.5, standard error 0.03)."""
    env = gymnasium.make_vec(
        "duel/Synthetic-v0", num_envs=16, budget=304, task_kwargs={"candidates": 32, "heldout_prompts": 256}
    )
    agent_class = load_agent(name)
    settings = agent_class.configure(recipe_of("duel/Synthetic-v0", name, {}))
    agent = agent_class(env.unwrapped.task.view(), settings, seed=3, budget=304)
    observation, _ = env.reset(seed=3)
    while env.unwrapped.remaining:
        duels = agent.act(observation)
        observation, _, _, _, info = env.step(duels.action())
        agent.update(duels.judged(info["preference"]))
    assert env.unwrapped.evaluate(agent.respond)["offline_win_rate"] > 0.8
    env.close()
