"""APL: prompts by entropy, pairs by certainty, and training anew on all labels at the end of each phase."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llm_duel_env.agents.apl import APL, keep
from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.agents.policies import make_policy
from llm_duel_env.benchmark.session import within_budget
from llm_duel_env.envs.vector_env import DuelVectorEnv
from llm_duel_env.tasks import make_task
from llm_duel_env.tasks.synthetic import Synthetic
from llm_duel_env.types import Candidates, Preferences

IDS = np.arange(8)
FAST = {
    "policy.learning_rate": 1e-3, "policy.warmup": 0.0, "policy.temperature": 1.0, "entropy_kept": 0.5,
    "entropy_samples": 2, "certainty_kept": 0.5, "epochs": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks():
    return {"finite": Synthetic(candidates=24, train_prompts=64, heldout_prompts=8), "text": make_task("tiny_tldr")}


@pytest.fixture(params=["finite", "text"])
def view(tasks, request):
    return tasks[request.param].view()


def make(view, budget=100, **changes):
    return APL(view, APL.configure({**FAST, **changes}), seed=0, budget=budget)


def judge(duels):
    first, second = ([len(str(r)) * 7 % 5 + hash_of(r) for r in column] for column in duels.pair.responses.T)
    return np.where(duels.query, np.array(first) > np.array(second), np.nan)


def hash_of(response):
    return sum(map(ord, str(response))) % 101 / 101


def play(view, agent, rounds):
    log = []
    for _ in range(rounds):
        duels = agent.act(view.observe((IDS + 8 * agent.round) % 64))
        log.append((duels.pair.responses.tolist(), duels.query.tolist(), agent.update(duels.judged(judge(duels)))))
    return log


def weights(agent):
    policy = getattr(agent, "policy", agent)
    model = policy.scorer if hasattr(policy, "scorer") else policy.model
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def peaked(view, prompts, steps=60):
    """An agent whose policy has been taught one response to each of `prompts`, and nothing about the others."""
    agent = make(view, entropy_samples=32, certainty_kept=1.0, **{"policy.learning_rate": 1e-2})
    observation = view.observe(prompts)
    for step in range(steps):
        pair = agent.policy.sample(observation, 2, ("teach", step))
        one = agent.policy.sample(observation, 1, ("one",), reference=True)
        ranked = Candidates.beside(one, pair.take(np.zeros((len(prompts), 1), np.int64)))
        agent.policy.learn(direct_optimizer("simpo", 2.0), ranked, progress=0.0, key=(step,))
    return agent


def exact_entropy(agent, observation):
    log_prob = agent.policy._log_softmax(agent.policy.scorer, observation).detach().double()
    return -(log_prob.exp() * log_prob).sum(dim=1).numpy()


def test_the_entropy_is_the_policys_and_has_the_right_sign(tasks):
    view = tasks["finite"].view()
    agent = peaked(view, np.array([3]))
    observation = view.observe(IDS)
    exact = exact_entropy(agent, observation)
    many = make(view, entropy_samples=4000)
    many.policy = agent.policy
    np.testing.assert_allclose(many.entropy(observation), exact, atol=0.06)
    assert exact.argmin() == 3
    fresh = make(view)
    np.testing.assert_allclose(fresh.entropy(observation), math.log(24), rtol=1e-5)


def test_a_peaked_prompt_is_dropped_first(tasks):
    view = tasks["finite"].view()
    agent = peaked(view, np.array([3]))
    observation = view.observe(IDS)
    exact = exact_entropy(agent, observation)
    assert np.sort(exact)[0] < 0.7 * np.sort(exact)[1]
    duels = agent.act(observation)
    estimate = agent.entropy(observation)
    different = duels.pair.responses[:, 0] != duels.pair.responses[:, 1]
    assert not duels.query[3]
    for share in (0.875, 0.5):  # whatever is dropped, it is
        assert not keep(estimate, np.ones(8, bool), share, np.zeros(8))[3]
    if different[3]:
        assert set(estimate[duels.query]) == set(sorted(estimate[different])[-int(np.ceil(different.sum() / 2)) :])


def test_text_that_was_learnt_by_heart_has_less_entropy(tasks):
    view = tasks["text"].view()
    agent, fresh = peaked(view, np.array([3]), steps=12), make(view, entropy_samples=32)
    change = agent.entropy(view.observe(IDS)) - fresh.entropy(view.observe(IDS))
    assert change[3] < -1
    assert change.mean() < -1  # what is learnt about one prompt bears on others


def test_certainty_keeps_the_largest_implicit_margins_and_uncertainty_the_smallest(view):
    for rule in ("certainty", "uncertainty"):
        agent = make(view, rule=rule, certainty_kept=0.25, beta=0.3)
        pair = agent.policy.sample(view.observe(IDS), 2, ("x",))
        one_wins = Preferences(pair, np.ones(8), np.ones(8, bool))
        agent.policy.update(direct_optimizer("dpo", 0.3), one_wins, progress=0.0, key=(0,))  # away from the reference
        duels = agent.act(view.observe(IDS))
        reward = 0.3 * (agent.policy.log_prob(duels.pair) - agent.policy.reference_log_prob(duels.pair)).numpy()
        margin = np.abs(reward[:, 0] - reward[:, 1])
        different = duels.pair.responses[:, 0] != duels.pair.responses[:, 1]
        order = np.argsort(-margin if rule == "certainty" else margin)
        expected = [row for row in order if different[row]][: int(np.ceil(different.sum() / 4))]
        assert sorted(expected) == np.flatnonzero(duels.query).tolist()


def test_keep_is_brute_force_and_never_empty():
    rng = np.random.default_rng(0)
    for _ in range(200):
        values, among, draws = rng.integers(0, 4, 9).astype(float), rng.random(9) < 0.6, rng.random(9)
        share = rng.choice([0.01, 0.25, 0.5, 1.0])
        kept = keep(values, among, share, draws)
        rows = sorted(np.flatnonzero(among), key=lambda row: (-values[row], draws[row]))
        assert sorted(rows[: math.ceil(share * len(rows))]) == np.flatnonzero(kept).tolist()
        assert kept.any() == among.any()
    with pytest.raises(ValueError, match="expected one shape"):
        keep(np.zeros(3), np.ones(2, bool), 0.5, np.zeros(3))


def test_the_rest_is_abstained_from_and_some_prompt_is_always_asked_about(view):
    agent = make(view, entropy_kept=0.01, certainty_kept=0.01)
    for number in range(3):
        duels = agent.act(view.observe(IDS + number))
        assert duels.query.sum() == 1
        assert np.isnan(duels.synthetic).all()
        agent.round += 1


def test_identical_pairs_are_never_asked_about(tasks, monkeypatch):
    view = tasks["finite"].view()
    agent = make(view)
    same = Candidates(view.observe(IDS), np.full((8, 2), 4))
    monkeypatch.setattr(agent.policy, "sample", lambda *args, **kwargs: same)
    duels = agent.act(view.observe(IDS))
    assert not duels.query.any()
    assert agent.update(duels.judged(np.full(8, np.nan)))["asked"] == 0.0


def test_phases_end_at_equal_shares_of_the_budget_and_retrain_from_the_start_on_all_data(view):
    agent = make(view, budget=16, rule="random", certainty_kept=0.25, phases=4, epochs=2)
    data, trained = [], []
    for _ in range(8):  # two queries a round, two rounds a phase
        observation = view.observe(IDS + 8 * agent.round)
        duels = agent.act(observation)
        assert duels.query.sum() == 2
        preferences = duels.judged(judge(duels))
        data.append(preferences.rows(preferences.from_oracle).decided())
        before = weights(agent).clone()
        learnt = agent.update(preferences)
        trained.append("loss" in learnt)
        if not trained[-1]:
            assert torch.equal(weights(agent), before)
            continue
        assert learnt["labels"] == sum(map(len, data)) == agent.queries
        assert learnt["phase"] == agent.queries / 4
        fresh = make_policy(view, agent.config.policy, seed=0)
        ranked = Preferences.stack(data).ordered()
        for epoch in range(2):
            key = ("retrain", agent.phase, epoch)
            fresh.learn(agent.optimizer, ranked, progress=epoch / 2, key=key)
        assert torch.equal(weights(agent), weights(fresh))
    assert trained == [False, True] * 4
    assert agent.policy.gradient_steps == 2 * 4  # the count goes on over resets


def test_the_whole_budget_is_learnt_from_in_the_environment(tasks):
    env = DuelVectorEnv(8, task=tasks["finite"], budget=30)
    agent = make(tasks["finite"].view(), budget=30)
    observation, _ = env.reset(seed=0)
    while env.remaining:
        duels = within_budget(agent.act(observation), int(env.remaining))  # as the runner cuts the last round
        observation, _, _, _, info = env.step(duels.action())
        agent.update(duels.judged(info["preference"]))
        assert agent.queries == env.query_count
    assert (agent.queries, agent.phase) == (30, 4)
    assert sum(map(len, agent.data)) == agent.queries


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_resumed_agent_goes_on_exactly(view, tmp_path, rounds):
    agent, other = make(view, budget=12), make(view, budget=12)
    play(view, agent, rounds)
    agent.save(tmp_path)
    other.load(tmp_path)
    assert play(view, agent, 3) == play(view, other, 3)
    assert agent.phase == other.phase > 1
    assert torch.equal(weights(agent), weights(other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "best"}, r"rule: expected one of \('entropy\+certainty', .*got 'best'"),
        ({"entropy_kept": 0.0}, r"entropy_kept: expected a share in \(0, 1\], got 0.0"),
        ({"certainty_kept": 1.5}, r"certainty_kept: expected a share in \(0, 1\], got 1.5"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(tasks, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tasks["finite"].view(), **changes)
