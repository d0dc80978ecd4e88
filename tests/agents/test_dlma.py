"""DLMA: its own labels, its own margins, no query."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.benchmark.leaderboard import tables
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.runner import run
from llm_duel_env.oracles.utility import UtilityOracle
from llm_duel_env.tasks.tiny_tldr import conditioned


def test_the_answer_under_the_good_instruction_wins_and_nobody_is_asked(tiny_game, monkeypatch):
    monkeypatch.setattr(UtilityOracle, "win_probability", lambda *_: pytest.fail("the oracle was asked"))
    env, agent = tiny_game.make("dlma", batch=4)
    tiny_game.play(env, agent, 1)
    _, ((duels, preferences, learnt),) = tiny_game.play(env, agent, 1)  # the policy has moved, the answers have not
    seen = duels.pair.observation
    _, fresh = tiny_game.make("dlma", batch=4)
    assert (agent.policy.log_prob(duels.pair) != fresh.policy.log_prob(duels.pair)).any()
    np.testing.assert_allclose(agent.self_rewards(duels.pair), fresh.self_rewards(duels.pair), atol=1e-5)
    for column, name in enumerate(("good", "bad")):
        sampled = fresh.policy.sample(conditioned(seen, [name] * 4), 1, (name, 1))
        assert duels.pair.responses[:, column].tolist() == sampled.responses[:, 0].tolist()
    same = duels.pair.responses[:, 0] == duels.pair.responses[:, 1]
    assert not duels.query.any()
    assert not preferences.from_oracle.any()
    assert (preferences.first_wins[~same] == 1).all()
    assert np.isnan(preferences.first_wins[same]).all()
    assert learnt["pairs"] == (~same).sum() > 0
    assert agent.queries == env.query_count == 0


def test_the_margin_is_the_papers_and_without_it_this_is_dpo(tiny_game):
    _, agent = tiny_game.make("dlma", margin_weight=0.0)
    _, other = tiny_game.make("dlma", margin_weight=0.0)
    observation = tiny_game.task.observe(np.arange(3))
    duels = agent.act(observation)
    log_prob = [
        agent.policy.log_prob(replace(duels.pair, observation=conditioned(observation, [name] * 3))).numpy()
        for name in ("good", "bad")
    ]
    stored = replace(duels.pair, reference_log_prob=np.zeros((3, 2), np.float32), reference_version=0)
    rewards = agent.self_rewards(stored)  # what is stored is of the plain prompt, and is not taken
    np.testing.assert_allclose(rewards, log_prob[0] - log_prob[1], atol=1e-5)
    assert (rewards[:, 0] - rewards[:, 1]).mean() > 0  # the supervised policy does obey the instructions
    preferences = duels.judged(np.full(3, np.nan))
    learnt = agent.update(preferences)
    plain = other.policy.update(direct_optimizer("dpo", 0.1), preferences, progress=0.0, key=("update", 0))
    assert learnt["loss"] == pytest.approx(plain["loss"])
    torch.testing.assert_close(agent.policy.log_prob(duels.pair), other.policy.log_prob(duels.pair))


def test_two_rounds_and_a_resume(tiny_game, tmp_path):
    _, agent = tiny_game.make("dlma", batch=3, **{"rounds": 2})
    assert agent.progress == 0
    log = tiny_game.check_resume("dlma", tmp_path / "saved", batch=3)
    assert [learnt["gradient_steps"] for _, _, learnt in log] == [1, 1]
    agent.round = 1
    assert agent.progress == 0.5  # counted in rounds, as no query is ever bought


def test_a_run_ends_as_stalled_and_is_scored(tmp_path):
    config = RunConfig(
        agent="dlma", env="duel/TinyTLDR-v0", folder=str(tmp_path / "run"), budget=40, batch=4, eval_prompts=8,
        max_stalled_rounds=2, overrides={"policy.learning_rate": 1e-4, "rounds": 2},
    )  # fmt: skip
    result = run(config, say=lambda line: None)
    assert (result["status"], result["queries"], result["rounds"]) == ("stalled", 0, 2)
    assert result["gradient_steps"] == 2
    assert result["curve"]["queries"] == [0, 0]
    assert all(0 <= rate <= 1 for rate in result["curve"]["offline_win_rate"])
    (table,) = tables([result])
    assert (table.rows[0].stalled, table.asks) == (1, ("contrast_prompts",))
    assert table.rows[0].area == result["curve"]["offline_win_rate"][-1]
