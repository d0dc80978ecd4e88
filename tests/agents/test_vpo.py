"""VPO: one sign between optimism and pessimism."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from llm_duel_env.agents.online_dpo import OnlineDPO
from llm_duel_env.agents.vpo import VPO
from llm_duel_env.baselines.offline_dpo import OfflineDPO
from llm_duel_env.tasks import make_task
from llm_duel_env.tasks.synthetic import Synthetic

IDS = np.array([5, 9, 2, 30])
LABELS = np.array([1.0, 0.0, 0.0, 1.0])
FAST = {"policy.learning_rate": 1e-3, "policy.warmup": 0.0, "policy.temperature": 1.0}


@pytest.fixture(scope="module")
def views():
    finite = Synthetic(candidates=24, train_prompts=64, heldout_prompts=8)
    return {"finite": finite.view(), "text": make_task("tiny_tldr").view()}


@pytest.fixture(params=["finite", "text"])
def view(views, request):
    return views[request.param]


def make(view, agent_class=VPO, **changes):
    return agent_class(view, agent_class.configure({**FAST, **changes}), seed=0, budget=100)


def play(view, agent, rounds):
    shown = []
    for number in range(rounds):
        duels = agent.act(view.observe(IDS + number))
        shown.append(duels.pair)
        agent.update(duels.judged(np.roll(LABELS, number)))
    return shown


def weights(agent):
    model = agent.policy.scorer if hasattr(agent.policy, "scorer") else agent.policy.model
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def nothing(ranked):
    return ranked.policy.sum() * 0.0, {}


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_with_the_direct_loss_off_online_lowers_and_offline_raises_the_calibration_responses(view, mode):
    agent = make(view, mode=mode, alpha=1.0, beta=0.1)
    agent.loss = replace(agent.loss, loss=nothing)
    duels = agent.act(view.observe(IDS))
    winners = duels.pair.take(np.where(LABELS == 1, 0, 1)[:, None])
    bonus = agent._calibration if mode == "online" else winners
    assert bonus.from_reference.all()
    before = agent.policy.log_prob(bonus).mean()
    agent.update(duels.judged(LABELS))
    change = float(agent.policy.log_prob(bonus).mean() - before)
    assert change * {"online": -1, "offline": 1}[mode] > 1e-4


class Recorder:
    def __init__(self):
        self.seen = []

    def __call__(self, ranked):
        self.seen.append(ranked)
        return ranked.policy.sum() * 0.0, {}


def test_offline_calibrates_on_the_winners_and_online_on_samples_that_are_not_shown(view):
    for mode in ("online", "offline"):
        agent, seen = make(view, mode=mode), Recorder()
        play(view, agent, 2)  # at the start all candidates of the finite task are equally probable
        agent.loss = replace(agent.loss, loss=seen)
        duels = agent.act(view.observe(IDS))
        agent.update(duels.judged(np.array([1.0, 0.0, 0.5, 1.0])))  # a tie teaches nothing
        bonus = torch.cat([part.bonus for part in seen.seen])
        assert len(bonus) == 3
        won = torch.cat([part.policy for part in seen.seen])[:, 0]
        assert torch.allclose(bonus, won) == (mode == "offline")


def test_offline_duels_never_follow_the_policy_and_online_ones_do(view):
    fast = {"policy.learning_rate": 3e-2}
    for mode in ("online", "offline"):
        agent = make(view, mode=mode, **fast)
        before = agent.act(view.observe(IDS)).pair
        play(view, agent, 5)
        agent.round = 0
        after = agent.act(view.observe(IDS)).pair
        assert (before.responses.tolist() == after.responses.tolist()) == (mode == "offline")
        assert (after.from_reference is not None) == (mode == "offline")


@pytest.mark.parametrize(("mode", "plain"), [("online", OnlineDPO), ("offline", OfflineDPO)])
def test_with_alpha_0_it_is_plain_dpo_bit_for_bit(view, mode, plain):
    agents = [make(view, mode=mode, alpha=0.0), make(view, plain), make(view, mode=mode, alpha=1.0)]
    for agent in agents:
        play(view, agent, 3)
    assert torch.equal(weights(agents[0]), weights(agents[1]))
    assert not torch.equal(weights(agents[0]), weights(agents[2]))


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_resumed_agent_goes_on_exactly(view, tmp_path, mode):
    agent, other = make(view, mode=mode), make(view, mode=mode)
    play(view, agent, 2)
    agent.save(tmp_path)
    other.load(tmp_path)
    shown = [[pair.responses.tolist() for pair in play(view, one, 2)] for one in (agent, other)]
    assert shown[0] == shown[1]
    assert torch.equal(weights(agent), weights(other))


def test_an_unknown_mode_is_refused(views):
    with pytest.raises(ValueError, match="mode: expected online or offline, got 'both'"):
        make(views["finite"], mode="both")
