"""XPO: asymmetric duels, reference responses fresh for every visit, and a term that pushes them down."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from llm_duel_env.agents.online_dpo import OnlineDPO
from llm_duel_env.agents.xpo import XPO
from llm_duel_env.tasks import make_task
from llm_duel_env.tasks.synthetic import Synthetic
from llm_duel_env.types import Candidates

IDS = np.array([5, 9, 2])
FAST = {"policy.learning_rate": 1e-3, "policy.warmup": 0.0, "policy.temperature": 1.0}


@pytest.fixture(scope="module")
def views():
    finite = Synthetic(candidates=24, train_prompts=64, heldout_prompts=8)
    return {"finite": finite.view(), "text": make_task("tiny_tldr").view()}


@pytest.fixture(params=["finite", "text"])
def view(views, request):
    return views[request.param]


def make(view, agent_class=XPO, **changes):
    return agent_class(view, agent_class.configure({**FAST, **changes}), seed=0, budget=100)


def play(view, agent, rounds, ids=IDS, offset=0):
    """Rounds on the same prompts, labelled by turns; returns the duels."""
    shown = []
    for number in range(rounds):
        duels = agent.act(view.observe(ids))
        labels = (np.arange(len(ids)) + number + offset) % 2
        shown.append(duels.pair)
        agent.update(duels.judged(labels.astype(float)))
    return shown


def weights(agent):
    model = agent.policy.scorer if hasattr(agent.policy, "scorer") else agent.policy.model
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def nothing(ranked):
    return ranked.policy.sum() * 0.0, {}


class Recorder:
    def __init__(self):
        self.tags = []

    def __call__(self, ranked):
        self.tags.append(ranked.from_reference)
        return ranked.policy.sum() * 0.0, {}


@pytest.mark.parametrize("reference_wins", [True, False])
def test_with_the_direct_loss_off_a_step_lowers_the_reference_response(view, reference_wins):
    agent = make(view)
    agent.loss = replace(agent.loss, loss=nothing, weight=0.1)
    duels = agent.act(view.observe(IDS))
    drawn = duels.pair.take(np.ones((3, 1), np.int64))
    before = agent.policy.log_prob(drawn).mean()
    learnt = agent.update(duels.judged(np.full(3, 0.0 if reference_wins else 1.0)))
    assert learnt["bonus_rows"] == 1.0
    assert float(agent.policy.log_prob(drawn).mean() - before) < -1e-4


def test_the_reference_response_is_tagged_when_drawn_won_or_lost(view):
    agent = make(view)
    agent.loss = replace(agent.loss, loss=(seen := Recorder()))
    duels = agent.act(view.observe(IDS))
    assert duels.pair.from_reference.tolist() == [[False, True]] * 3
    agent.update(duels.judged(np.array([1.0, 0.0, 1.0])))
    tags = torch.cat(seen.tags).tolist()  # winner first
    assert sorted(tags) == [[False, True], [False, True], [True, False]]


def test_the_default_is_the_plain_weight_not_times_beta(view):
    assert make(view, alpha=0.3, beta=0.5).loss.weight == 0.3
    assert make(view).config.alpha == 5e-6


def test_a_reference_response_is_fresh_for_every_visit_and_a_function_of_prompt_and_visit(view):
    agent, other = make(view), make(view)
    drawn = [agent.references(view.observe(IDS)).responses[:, 0] for _ in range(6)]
    assert all(len({str(visit[row]) for visit in drawn}) > 1 for row in range(3))
    # Other prompts between, another order, and a prompt that comes twice in a round: the same responses.
    other.references(view.observe(np.array([1, 9])))
    other.references(view.observe(np.array([2, 3, 2])))
    assert other.references(view.observe(np.array([9]))).responses[0, 0] == drawn[1][1]
    twice = other.references(view.observe(np.array([9, 2, 9]))).responses[:, 0]
    assert twice.tolist() == [drawn[2][1], drawn[2][2], drawn[3][1]]


def test_the_reference_sample_is_the_frozen_base_models(view):
    agent = make(view, **{"policy.learning_rate": 3e-2})
    base = copy.deepcopy(agent.policy)  # before any training
    play(view, agent, 5)
    drawn = agent.references(view.observe(IDS))
    assert drawn.from_reference.all()
    expected = base.sample(view.observe(IDS), 1, ("reference", 5))
    assert drawn.responses.tolist() == expected.responses.tolist()
    np.testing.assert_allclose(agent.policy.reference_log_prob(drawn), base.log_prob(drawn), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(agent.policy.log_prob(drawn), base.log_prob(drawn), atol=1e-2)


def test_drawing_ahead_changes_the_batches_and_nothing_else(views, monkeypatch):
    view, found = views["finite"], []
    for ahead in (0, 20):
        agent, sizes = make(view, ahead=ahead), []
        sample = agent.policy.sample

        def counted(observation, n, key, sample=sample, sizes=sizes, **kwargs):
            if kwargs.get("reference"):
                sizes.append(len(observation["prompt_id"]))
            return sample(observation, n, key, **kwargs)

        monkeypatch.setattr(agent.policy, "sample", counted)
        order = np.random.default_rng(0).permutation(64).reshape(16, 4)
        shown = [play(view, agent, 1, ids)[0].responses.tolist() for ids in np.concatenate([order, order[::-1]])]
        found.append((shown, len(sizes), max(sizes)))
    assert found[0][0] == found[1][0]
    assert found[0][1:] == (32, 4)
    assert found[1][1] < 16
    assert found[1][2] > 20
    with pytest.raises(ValueError, match="ahead: expected a number of prompts of at least 0, got -1"):
        make(view, ahead=-1)


class AsymmetricDPO(OnlineDPO):
    """Iterative DPO with XPO's duels, written independently."""

    def act(self, observation):
        own = self.policy.sample(observation, 1, ("act", self.round))
        reference = self.policy.sample(observation, 1, ("reference", self.round), reference=True)
        return Candidates.beside(own, reference).first_two()


def test_with_alpha_0_it_is_iterative_dpo_with_asymmetric_duels(view):
    agents = [make(view, alpha=0.0), make(view, AsymmetricDPO), make(view, alpha=0.1)]
    for agent in agents:
        play(view, agent, 4)
    assert torch.equal(weights(agents[0]), weights(agents[1]))
    assert not torch.equal(weights(agents[0]), weights(agents[2]))


@pytest.mark.parametrize("ahead", [0, 5])
def test_a_resumed_agent_goes_on_exactly(view, tmp_path, ahead):
    agent, other = make(view, ahead=ahead), make(view, ahead=ahead)
    play(view, agent, 2)
    agent.save(tmp_path)
    other.load(tmp_path)
    expected = [pair.responses.tolist() for pair in play(view, agent, 2)]
    assert [pair.responses.tolist() for pair in play(view, other, 2)] == expected
    assert torch.equal(weights(agent), weights(other))
    assert agent.visited == other.visited == {5: 4, 9: 4, 2: 4}
