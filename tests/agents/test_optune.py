"""OPTune: what is regenerated, what is kept, and what that costs."""

import json

import numpy as np
import pytest


def test_the_unknown_and_the_lowest_share_are_regenerated(finite_game):
    _, agent = finite_game.make("optune", regenerated=0.5)
    rewards = np.array([0.3, np.nan, -1.0, 2.0, np.nan, 0.1, 0.2])
    assert agent.choose(rewards).tolist() == [False, True, True, False, True, True, True]  # 3 of 5 known, rounded up
    assert agent.choose(np.array([1.0, 0.0])).tolist() == [False, True]
    assert agent.choose(np.full(3, np.nan)).all()


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_kept_pairs_cost_nothing_and_are_trained_on_again(finite_game, tmp_path, share):
    env, agent = finite_game.make("optune", batch=8, regenerated=share, ledger=tmp_path / "ledger.jsonl")
    observation, _ = finite_game.play(env, agent, 1)
    known = dict(agent.memory)
    rewards = {prompt: agent.reward(prompt) for prompt in known}
    sampled = []
    sample = agent.policy.sample
    agent.policy.sample = lambda o, n, key, **kw: sampled.extend(o["prompt_id"].tolist()) or sample(o, n, key, **kw)
    bought = env.query_count
    _, ((duels, preferences, learnt),) = finite_game.play(env, agent, 1, observation)
    ids = duels.pair.observation["prompt_id"]
    lowest = sorted(rewards, key=rewards.get)[: int(np.ceil(share * len(rewards)))]
    fresh = [i for i in ids.tolist() if i in lowest or i not in known]
    assert sampled == fresh  # nothing is generated for the others
    assert duels.query.tolist() == [i in fresh for i in ids]
    for row, prompt in enumerate(ids.tolist()):
        if prompt not in fresh:
            assert duels.pair.responses[row].tolist() == known[prompt].pair.responses[0].tolist()
            assert preferences.first_wins[row] == known[prompt].first_wins[0]
            assert not preferences.from_oracle[row]
    paid = (duels.query & (duels.pair.responses[:, 0] != duels.pair.responses[:, 1])).sum()
    assert env.query_count - bought == paid == agent.queries - bought
    assert learnt["pairs"] == np.isin(preferences.first_wins, (0, 1)).sum()  # kept ones included
    records = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert sum("label" in record for record in records) == env.query_count
    env.close()


def test_kept_pairs_weigh_by_their_own_scores_in_their_own_order(finite_game):
    env, agent = finite_game.make("optune", batch=8, regenerated=0.25)
    observation, _ = finite_game.play(env, agent, 1)
    known, taught = dict(agent.memory), []
    update = agent.policy.update
    agent.policy.update = lambda *given, scores, **kw: taught.append(scores) or update(*given, scores=scores, **kw)
    _, ((duels, _, learnt),) = finite_game.play(env, agent, 1, observation)
    ids = duels.pair.observation["prompt_id"].tolist()
    kept = [row for row, prompt in enumerate(ids) if prompt in known and not duels.query[row]]
    assert len(kept) >= 4
    for row in kept:
        drawn = duels.pair.responses[row]
        utility = finite_game.task.utility({"prompt_id": np.array([ids[row]] * 2)}, drawn)
        np.testing.assert_allclose(taught[0][row], utility, rtol=1e-6)
        assert taught[0][row].tolist() == known[ids[row]].scores[0].tolist()
    assert learnt["regenerated_share"] == duels.query.mean()


def test_without_gap_weights_and_kept_pairs_it_is_half_of_online_dpo(finite_game):
    losses = []
    for name, settings in (("optune", {"regenerated": 1.0, "beta2": 0.0}), ("online_dpo", {})):
        env, agent = finite_game.make(name, batch=8, **settings)
        losses.append(finite_game.play(env, agent, 1)[1][0][2])
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"] / 2)
    assert losses[0]["grad_norm"] == pytest.approx(losses[1]["grad_norm"] / 2, rel=1e-4)


def test_resumes_exactly_with_its_memory(finite_game, tmp_path):
    log = finite_game.check_resume("optune", tmp_path / "saved", rounds=(2, 2), batch=8)
    assert not log[-1][0].query.all()


def test_text_resumes_too(tiny_game, tmp_path):
    env, agent = tiny_game.make("optune", batch=3)
    tiny_game.play(env, agent, 1)
    agent.save(tmp_path / "saved")
    _, other = tiny_game.make("optune", batch=3)
    other.load(tmp_path / "saved")
    assert other.memory.keys() == agent.memory.keys()
    for prompt, known in agent.memory.items():
        again = other.memory[prompt]
        assert again.pair.responses.tolist() == known.pair.responses.tolist()
        assert again.pair.tokens.tolist() == known.pair.tokens.tolist()
        assert again.scores.tolist() == known.scores.tolist()
        assert again.pair.observation["prompt"] == known.pair.observation["prompt"]


def test_a_share_of_nothing_is_refused(finite_game):
    with pytest.raises(ValueError, match="regenerated"):
        finite_game.make("optune", regenerated=0.0)
