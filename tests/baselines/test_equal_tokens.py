"""Online DPO with SEA's number of samples: how many it draws, whom it shows, and what it remembers."""

import numpy as np
import pytest
import torch

from llm_duel_env.agents.base import config_from
from llm_duel_env.agents.online_dpo import OnlineDPO
from llm_duel_env.baselines.online_dpo_equal_tokens import OnlineDPOEqualTokens
from llm_duel_env.tasks.synthetic import Synthetic

M = 10
TRAINED = {"policy.learning_rate": 2e-2, "policy.temperature": 1.0, "policy.warmup": 0.0}


@pytest.fixture(scope="module")
def task():
    return Synthetic(candidates=12, train_prompts=256, heldout_prompts=64)


def make(task, agent_class=OnlineDPOEqualTokens, budget=400, **changes):
    settings = config_from(agent_class.Config, TRAINED | changes)
    return agent_class(task.view(), settings, seed=0, budget=budget)


def play(task, agent, rounds):
    """Duels and metrics of rounds whose labels prefer the higher number."""
    log = []
    for _ in range(rounds):
        duels = agent.act(task.observe((np.arange(M) + agent.round * M) % task.train_prompts))
        first, second = duels.pair.responses.T
        label = np.where(first == second, 0.5, (first > second).astype(float))
        log.append((duels, agent.update(duels.judged(label))))
    return log


def test_it_samples_as_many_responses_per_query_as_sea(task):
    agent = make(task, candidates=20, oracle_share=0.7, burn_in=0.25)
    drawn = [M * learnt["samples"] for _, learnt in play(task, agent, 10)]
    assert drawn == [M * 20.0] * 10  # before the burn-in's 100 queries are over, all pairs being of two responses
    assert agent.queries == 100
    more = sum(M * learnt["samples"] for _, learnt in play(task, agent, 28))
    assert more / (agent.queries - 100) == pytest.approx(20 / 0.7, rel=0.01)


def test_a_pair_of_one_response_is_made_up_for(task):
    agent = make(task, candidates=2, oracle_share=1.0, rule="first_two")
    log = play(task, agent, 30)
    clashes = sum(int((duels.pair.responses[:, 0] == duels.pair.responses[:, 1]).sum()) for duels, _ in log)
    assert clashes > 5
    assert agent.owed == pytest.approx(-2 * clashes / M)  # it cannot draw less than a pair, and owes nothing


def test_the_best_duels_with_the_worst_by_the_implicit_reward(task):
    agent = make(task)
    play(task, agent, 5)
    observation = task.observe(np.arange(40))
    duels = agent.act(observation)
    drawn = agent.policy.sample(observation, agent._drawn, ("act", agent.round))
    gain = (agent.policy.log_prob(drawn) - agent.policy.reference_log_prob(drawn)).numpy()
    shown = agent.policy.log_prob(duels.pair) - agent.policy.reference_log_prob(duels.pair)
    np.testing.assert_allclose(shown[:, 0], gain.max(axis=1), atol=1e-5)
    np.testing.assert_allclose(shown[:, 1], gain.min(axis=1), atol=1e-5)
    torch.testing.assert_close(
        torch.from_numpy(duels.pair.reference_log_prob), agent.policy.reference_log_prob(duels.pair)
    )
    assert duels.query.all()


def test_with_two_samples_and_no_choice_it_is_online_dpo(task):
    agent, online = make(task, candidates=2, oracle_share=1.0, rule="first_two"), make(task, OnlineDPO)
    for (mine, learnt), (theirs, its) in zip(play(task, agent, 6), play(task, online, 6)):
        np.testing.assert_array_equal(mine.pair.responses, theirs.pair.responses)
        assert learnt["loss"] == its["loss"]


def test_what_is_owed_outlives_a_checkpoint(task, tmp_path):
    agent, other = make(task, burn_in=0.0), make(task, burn_in=0.0)
    play(task, agent, 3)
    agent.save(tmp_path)
    other.load(tmp_path)
    assert other.owed == agent.owed != 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"candidates": 1}, "candidates >= 2"), ({"oracle_share": 0.0}, "oracle_share"), ({"rule": "best"}, "'implicit'")],
)
def test_refusals(task, changes, said):
    with pytest.raises(ValueError, match=said):
        make(task, **changes)
