"""SELM: best and worst of {greedy, two samples} by duels, a term on the greedy response, and a reference that moves."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.agents.selm import SELM
from llm_duel_env.envs.vector_env import DuelVectorEnv
from llm_duel_env.tasks import make_task
from llm_duel_env.tasks.synthetic import Synthetic
from llm_duel_env.types import Candidates, Preferences

IDS = np.array([5, 9, 2, 30])
FAST = {"policy.learning_rate": 1e-3, "policy.warmup": 0.0, "policy.temperature": 1.0}


@pytest.fixture(scope="module")
def tasks():
    return {"finite": Synthetic(candidates=24, train_prompts=64, heldout_prompts=8), "text": make_task("tiny_tldr")}


@pytest.fixture(params=["finite", "text"])
def view(tasks, request):
    return tasks[request.param].view()


def make(view, budget=100, **changes):
    return SELM(view, SELM.configure({**FAST, **changes}), seed=0, budget=budget)


def quality(responses):
    """A strict order of responses of either kind, (M, N)."""
    known = sorted(set(responses.ravel().tolist()))
    return np.array([[known.index(r) for r in row] for row in responses.tolist()], float)


def answer(duels, order=quality):
    """What an oracle says whose utility is `order`; nothing where it is not asked."""
    first, second = order(duels.pair.responses).T
    return np.where(duels.query, np.where(first == second, 0.5, first > second), np.nan)


def play(view, agent, rounds, ids=IDS):
    shown = []
    for _ in range(rounds):
        duels = agent.act(view.observe(ids))
        shown.append((duels.pair.responses.tolist(), duels.query.tolist()))
        agent.update(duels.judged(answer(duels)))
    return shown


def weights(agent):
    model = agent.policy.scorer if hasattr(agent.policy, "scorer") else agent.policy.model
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def nothing(ranked):
    return ranked.policy.sum() * 0.0, {}


class Recorder:
    """In the place of a policy's `update`: keeps what it was told."""

    def __init__(self, agent):
        self.told = []
        agent.policy.update = self

    def __call__(self, loss, preferences: Preferences, *, progress, key, scores=None, bonus=None):
        self.told.append((preferences, bonus))
        return {}


def test_best_and_worst_of_three_are_found_in_two_or_three_queries(tasks):
    """All orders of {greedy, sample, sample}, ties of two among them, against sorting."""
    view = tasks["finite"].view()
    ranks = sorted(
        {*itertools.permutations((0.0, 1.0, 2.0)), *itertools.permutations((0.0, 0.0, 1.0)), (1.0, 1.0, 0.0)}
    )
    ranks += [(0.0, 1.0, 1.0), (1.0, 0.0, 1.0)]
    agent = make(view)
    told = Recorder(agent)
    observation = view.observe(np.arange(len(ranks)))
    three = Candidates(observation, np.tile([7, 11, 3], (len(ranks), 1)))
    agent.propose = lambda observation: three
    utility = np.array(ranks)
    column = {7: 0, 11: 1, 3: 2}

    def order(pair):
        return np.array([[row[column[int(r)]] for r in shown] for row, shown in zip(utility, pair)])

    asked = np.zeros(len(ranks))
    for _ in range(3):
        duels = agent.act(observation)
        asked += duels.query
        assert agent.update(duels.judged(answer(duels, order))).keys() >= (
            {"greedy_best"} if agent.stage == 0 else set()
        )
    preferences, bonus = told.told[0]
    assert len(told.told) == 1
    assert bonus.responses.tolist() == [[7]] * len(ranks)  # greedy, whatever its rank
    found = order(preferences.pair.responses)
    assert found[:, 0].tolist() == utility.max(axis=1).tolist()
    assert found[:, 1].tolist() == utility.min(axis=1).tolist()
    assert (preferences.first_wins == 1).all()
    assert set(asked.tolist()) == {2.0, 3.0}
    for row, queries in zip(ranks, asked):  # a third duel only where a sample is the best and both others have lost
        assert (queries == 3) == (max(row[1:]) > row[0] and row[1] != row[2])
    assert agent.queries == asked.sum()


def test_three_equal_responses_teach_nothing(tasks):
    view = tasks["finite"].view()
    agent = make(view)
    told, before = Recorder(agent), weights(agent).clone()
    agent.propose = lambda observation: Candidates(observation, np.full((4, 3), 5))
    play(view, agent, 3)
    assert (told.told[0][0].first_wins == 0.5).all()
    assert agent.queries == 0
    assert torch.equal(weights(agent), before)


def test_candidates_are_the_greedy_response_and_two_samples(view):
    agent = make(view, **{"policy.learning_rate": 1e-2})
    play(view, agent, 3)
    candidates = agent.propose(view.observe(IDS))
    assert candidates.shape == (4, 3)
    assert candidates.responses[:, :1].tolist() == agent.policy.greedy(view.observe(IDS)).responses.tolist()
    samples = agent.policy.sample(view.observe(IDS), 2, ("act", agent.round))
    assert candidates.responses[:, 1:].tolist() == samples.responses.tolist()


def test_greedy_proposals_count_as_generated_tokens(tasks):
    view = tasks["text"].view()
    agent = make(view)
    assert agent.policy.generated_tokens == 0
    candidates = agent.propose(view.observe(IDS))
    assert agent.policy.generated_tokens == candidates.lengths.sum()


@pytest.mark.parametrize("wins", ["always", "never"])
def test_with_the_direct_loss_off_a_step_lowers_the_greedy_response_whatever_its_rank(view, wins):
    agent = make(view)
    agent.loss = replace(agent.loss, loss=nothing, weight=0.1)
    greedy = agent.policy.greedy(view.observe(IDS))
    before = agent.policy.log_prob(greedy).mean()
    best = greedy.responses[:, 0]

    def order(pair):
        own = pair == best[:, None]
        return np.where(own, 1e6 if wins == "always" else -1e6, quality(pair))

    for _ in range(3):
        duels = agent.act(view.observe(IDS))
        learnt = agent.update(duels.judged(answer(duels, order)))
    assert learnt["greedy_best" if wins == "always" else "greedy_worst"] == learnt["pairs"] / len(IDS) > 0
    assert float(agent.policy.log_prob(greedy).mean() - before) < -1e-4


def test_the_weight_is_alpha_times_beta(tasks):
    assert make(tasks["finite"].view(), alpha=0.005, beta=0.2).loss.weight == pytest.approx(0.001)


def test_the_reference_moves_to_the_previous_iterate_at_shares_of_the_budget(view):
    agent = make(view, budget=36, **{"policy.learning_rate": 1e-2})
    probe = agent.policy.sample(view.observe(IDS), 2, ("probe",))
    start, versions = agent.policy.log_prob(probe), []
    expected = start
    while agent.queries < 36:
        left = 36 - agent.queries
        duels = agent.act(view.observe(IDS))
        duels = replace(duels, query=duels.query & (np.cumsum(duels.query) <= left))
        agent.update(duels.judged(answer(duels)))
        if agent.policy.reference_version > (versions[-1] if versions else 0):
            expected = agent.policy.log_prob(probe)  # the iterate just finished
        versions.append(agent.policy.reference_version)
        if agent.stage == 0:
            assert versions[-1] == min(int(agent.queries / 36 * 3), 2)
        torch.testing.assert_close(agent.policy.reference_log_prob(probe), expected, rtol=1e-4, atol=1e-4)
    assert set(versions) == {0, 1, 2}
    assert not torch.allclose(expected, start, atol=1e-3)
    one = make(view, budget=8, iterations=1)
    play(view, one, 6)
    assert one.policy.reference_version == 0


def test_in_the_environment_prompts_stay_for_three_rounds_and_every_duel_is_charged(tasks):
    env = DuelVectorEnv(8, task=tasks["finite"], budget=60)
    agent = make(tasks["finite"].view(), budget=60)
    observation, _ = env.reset(seed=0)
    prompts, trained = [], 0
    while env.remaining:
        prompts.append(observation["prompt_id"].tolist())
        duels = agent.act(observation)
        paid = duels.query & (duels.pair.responses[:, 0] != duels.pair.responses[:, 1])
        duels = replace(duels, query=duels.query & ~(paid & (np.cumsum(paid) > env.remaining)))
        observation, _, _, _, info = env.step(duels.action())
        learnt = agent.update(duels.judged(info["preference"]))
        trained += "loss" in learnt
        assert agent.queries == env.query_count
        if "queries_per_pair" in learnt:
            assert learnt["queries_per_pair"] >= 1
    for start in range(0, len(prompts) - 2, 3):
        assert prompts[start] == prompts[start + 1] == prompts[start + 2]
    assert prompts[0] != prompts[3]
    # Labels of a ranking that the budget cut short are learnt from too.
    assert trained == -(-len(prompts) // 3)
    assert len(prompts) % 3


def test_other_prompts_in_the_middle_of_a_ranking_are_refused(tasks):
    view = tasks["finite"].view()
    agent = make(view)
    play(view, agent, 1)
    with pytest.raises(ValueError, match=r"expected the prompts \[5, 9, 2, 30\] again, got \[1, 2, 3, 4\]"):
        agent.act(view.observe(np.array([1, 2, 3, 4])))


@pytest.mark.parametrize("rounds", [2, 3, 4])
def test_a_resumed_agent_goes_on_exactly_in_the_middle_of_a_ranking_too(view, tmp_path, rounds):
    settings = {"budget": 30, "iterations": 4}
    agent, other = make(view, **settings), make(view, **settings)
    play(view, agent, rounds)
    agent.save(tmp_path)
    other.load(tmp_path)
    assert play(view, agent, 4) == play(view, other, 4)
    assert torch.equal(weights(agent), weights(other))
    assert agent.policy.generated_tokens == other.policy.generated_tokens
    assert agent.policy.reference_version == other.policy.reference_version > 0


def test_with_alpha_0_it_is_iterative_dpo_on_the_same_pairs(view):
    agents = [make(view, alpha=0.0), make(view, alpha=0.5), make(view, alpha=100.0)]
    update, plain = agents[1].policy.update, direct_optimizer("dpo", agents[1].config.beta)
    agents[1].policy.update = lambda loss, pairs, *, progress, key, bonus: update(
        plain, pairs, progress=progress, key=key
    )
    for agent in agents:
        play(view, agent, 6)
    assert torch.equal(weights(agents[0]), weights(agents[1]))
    assert not torch.allclose(weights(agents[0]), weights(agents[2]), rtol=1e-4, atol=1e-4)
