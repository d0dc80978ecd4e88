"""SPO: the auxiliary task beside DPO."""

import numpy as np
import pytest
import torch
from torch import nn

from llm_duel_env.agents.policies.final_states import final_states
from llm_duel_env.agents.spo import LEVELS, WithLevels
from llm_duel_env.tasks.tiny_language import degrade
from llm_duel_env.types import Preferences


def labelled(game, agent, count=4):
    observation = game.task.observe(np.arange(count))
    pair = agent.policy.sample(observation, 2, ("pairs",))
    same = pair.responses[:, 0] == pair.responses[:, 1]
    return Preferences(pair, np.where(same, 0.5, np.arange(count) % 2).astype(np.float32), np.ones(count, bool))


def test_without_the_auxiliary_loss_it_is_online_dpo(tiny_game):
    _, agent = tiny_game.make("spo", gamma=0.0)
    _, other = tiny_game.make("online_dpo")
    preferences = labelled(tiny_game, agent)
    assert agent.update(preferences) == other.update(preferences)
    assert torch.equal(agent.policy.log_prob(preferences.pair), other.policy.log_prob(preferences.pair))


def test_levels_are_the_degraders_and_the_states_are_of_the_end_of_prompt_and_response(tiny_game):
    _, agent = tiny_game.make("spo")
    ranked = labelled(tiny_game, agent).decided().ordered()
    versions, levels = agent.degraded(ranked)
    for row, prompt in enumerate(ranked.observation["prompt"]):
        for column in (0, 1):
            wanted = degrade(prompt, ranked.responses[row, column], int(levels[row, column]))
            assert versions.responses[row, column] == wanted
    assert set(levels.ravel()) <= set(range(LEVELS))
    states = final_states(agent.policy, versions)
    ids = [*agent.policy.tokens.prompt(versions.observation["prompt"][1])]
    ids += versions.tokens[1, 0, : versions.lengths[1, 0]].tolist()
    alone = agent.policy.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    torch.testing.assert_close(states[1, 0], alone, rtol=1e-4, atol=1e-4)


def test_the_loss_is_dpo_plus_gamma_cross_entropy_whatever_the_microbatch(tiny_game):
    found = []
    for microbatch in (1, 8):
        _, agent = tiny_game.make("spo", gamma=0.5, **{"policy.microbatch": microbatch})
        nn.init.normal_(agent.head.weight, generator=torch.Generator().manual_seed(0))
        preferences = labelled(tiny_game, agent)
        versions, levels = agent.degraded(preferences.decided().ordered())
        with torch.no_grad():
            logits = agent.head(final_states(agent.policy, versions)).double()
        entropy = -logits.log_softmax(-1).gather(-1, torch.from_numpy(levels)[..., None]).mean()
        learnt = agent.update(preferences)
        assert learnt["level_loss"] == pytest.approx(float(entropy), rel=1e-4)
        assert learnt["loss"] == pytest.approx(np.log(2) + 0.5 * float(entropy), rel=1e-4)  # at the start h is 0
        found.append((learnt["grad_norm"], agent.head.weight.detach().clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    assert (found[0][1] - found[1][1]).abs().max() < 1e-4


def test_the_head_learns_and_the_policy_with_it(tiny_game):
    _, agent = tiny_game.make("spo", gamma=1.0, **{"policy.learning_rate": 3e-3, "policy.passes": 20})
    preferences = labelled(tiny_game, agent)
    first = agent.update(preferences)
    agent.round = 0  # the same levels again
    assert agent.update(preferences)["level_loss"] < first["level_loss"]
    assert agent.head.weight.abs().max() > 0


def test_rows_must_be_told():
    loss = WithLevels(lambda ranked: (torch.zeros(()), {}), 1.0, lambda rows: torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="which rows a microbatch holds: expected their index, got None"):
        loss(type("Ranked", (), {"index": None})())


def test_two_rounds_and_a_resume(tiny_game, tmp_path):
    tiny_game.check_resume("spo", tmp_path / "saved", batch=3)
