"""BMC: the bridge, and its limits."""

import numpy as np
import torch

from llm_duel_env.tasks.tiny_language import edit, utility
from llm_duel_env.types import Preferences


def labelled(game, agent, count=4):
    observation = game.task.observe(np.arange(count))
    pair = agent.policy.sample(observation, 2, ("pairs",))
    same = pair.responses[:, 0] == pair.responses[:, 1]
    labels = np.where(same, 0.5, np.arange(count) % 2).astype(np.float32)
    return Preferences(pair, labels, np.ones(count, bool))


def test_the_edited_loser_stands_for_the_winner(tiny_game):
    _, agent = tiny_game.make("bmc")
    ranked = labelled(tiny_game, agent, 8).decided().ordered()
    bridged = agent.bridged(ranked)
    wanted = []
    for prompt, (winner, loser), tokens in zip(ranked.observation["prompt"], ranked.responses, ranked.tokens):
        text = edit(prompt, loser, winner)
        assert utility(prompt, text) >= utility(prompt, loser)
        if text != loser:
            wanted.append((prompt, text, loser, tokens[1][tokens[1] > 0].tolist()))
    assert len(wanted) > 0
    found = zip(bridged.observation["prompt"], bridged.responses, bridged.tokens, bridged.lengths)
    assert wanted == [(p, r[0], r[1], t[1][: n[1]].tolist()) for p, r, t, n in found]  # the loser's own ids
    again = agent.policy.tokens.decode(bridged.tokens, bridged.lengths)
    assert again.tolist() == bridged.responses.tolist()


def test_what_the_editor_leaves_alone_teaches_nothing(tiny_game, monkeypatch):
    _, agent = tiny_game.make("bmc")
    monkeypatch.setattr(agent, "task", agent.task.__class__(**{**vars(agent.task), "edit": lambda p, lost, won: lost}))
    preferences = labelled(tiny_game, agent)
    before = agent.policy.log_prob(preferences.pair)
    assert agent.update(preferences) == {}
    torch.testing.assert_close(agent.policy.log_prob(preferences.pair), before, rtol=0, atol=0)


def test_without_bridge_and_weights_it_is_online_dpo(tiny_game):
    _, agent = tiny_game.make("bmc", bridge=False, delta=0.0, beta=0.1)
    _, other = tiny_game.make("online_dpo", beta=0.1)
    preferences = labelled(tiny_game, agent)
    mine, theirs = agent.update(preferences), other.update(preferences)
    np.testing.assert_allclose([mine[n] for n in theirs], list(theirs.values()), rtol=1e-4)
    torch.testing.assert_close(agent.policy.log_prob(preferences.pair), other.policy.log_prob(preferences.pair))


def test_two_rounds_and_a_resume(tiny_game, tmp_path):
    log = tiny_game.check_resume("bmc", tmp_path / "saved", batch=3)
    assert all(preferences.scores is None for _, preferences, _ in log)
    assert any(learnt.get("token_weight", 0) > 1 for _, _, learnt in log)
