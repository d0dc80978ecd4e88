"""PRO: rankings of n for n - 1 queries."""

import json
import re

import numpy as np
import pytest


def test_a_ranking_is_n_minus_1_duels_on_one_prompt_and_is_learnt_once_complete(finite_game, tmp_path):
    env, agent = finite_game.make("pro", batch=8, length=4, budget=100, ledger=tmp_path / "ledger.jsonl")
    learn, taught = agent.policy.learn, []
    agent.policy.learn = lambda loss, ranked, **kw: taught.append((ranked, kw["scores"])) or learn(loss, ranked, **kw)
    _, log = finite_game.play(env, agent, 3)
    prompts = [duels.pair.observation["prompt_id"].tolist() for duels, _, _ in log]
    assert prompts[0] == prompts[1] == prompts[2]
    assert [bool(learnt) for _, _, learnt in log] == [False, False, True]
    responses = np.concatenate([log[0][0].pair.responses, *[d.pair.responses[:, 1:] for d, _, _ in log[1:]]], axis=1)
    paid = sum(int((d.pair.responses[:, 0] != d.pair.responses[:, 1]).sum()) for d, _, _ in log)
    assert agent.queries == env.query_count == paid <= 8 * 3
    records = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert sum("label" in record for record in records) == paid
    ((ranked, scores),) = taught
    where = {int(i): row for row, i in enumerate(prompts[0])}
    for row, prompt in enumerate(ranked.observation["prompt_id"].tolist()):
        drawn = responses[where[prompt]]
        utility = finite_game.task.utility({"prompt_id": np.full(4, prompt)}, drawn)
        assert sorted(ranked.responses[row].tolist()) == sorted(drawn.tolist())
        np.testing.assert_allclose(scores[row], np.sort(utility)[::-1], rtol=1e-6)
        best = finite_game.task.utility({"prompt_id": np.full(4, prompt)}, ranked.responses[row])
        assert (np.diff(best) <= 0).all()
    env.close()


def test_twins_share_their_score_and_a_cut_ranking_is_left_out(finite_game):
    env, agent = finite_game.make("pro", batch=3, length=3)
    observation, _ = env.reset(seed=0)
    agent.act(observation)
    agent.candidates.responses[:] = [[1, 1, 2], [3, 4, 5], [6, 6, 6]]
    agent.scores[:] = [[np.nan, 0.5, 2.0], [1.0, 2.0, np.nan], [np.nan] * 3]
    ranked, scores = agent.rankings()
    assert ranked.responses.tolist() == [[2, 1, 1]]
    assert scores.tolist() == [[2.0, 0.5, 0.5]]


def test_labels_are_not_looked_at(finite_game):
    found = []
    for label in (0.0, 1.0):
        env, agent = finite_game.make("pro", batch=8)
        observation, _ = env.reset(seed=0)
        for _ in range(2):
            duels = agent.act(observation)
            learnt = agent.update(duels.judged(np.full(8, label), scores=duels.pair.responses.astype(float)))
        found.append(learnt)
    assert found[0] == found[1]


def test_resumes_exactly_in_the_middle_of_a_ranking(finite_game, tmp_path):
    finite_game.check_resume("pro", tmp_path / "saved", rounds=(3, 3), batch=8, length=3, budget=90)


def test_text_resumes_in_the_middle_of_a_ranking(tiny_game, tmp_path):
    log = tiny_game.check_resume("pro", tmp_path / "saved", rounds=(1, 1), batch=3)
    assert log[1][2]["gradient_steps"] == 1


def test_other_prompts_in_the_middle_of_a_ranking_are_refused_and_both_are_named(finite_game):
    env, agent = finite_game.make("pro", batch=3, length=3)
    observation, _ = env.reset(seed=0)
    agent.update(agent.act(observation).judged(np.ones(3), scores=np.zeros((3, 2))))
    kept, other = observation["prompt_id"].tolist(), (np.arange(2) + 7)
    with pytest.raises(ValueError, match=rf"expected the prompts {re.escape(str(kept))} again, got \[7, 8\]"):
        agent.act(finite_game.task.observe(other))


def test_what_is_missing_is_named(finite_game):
    env, agent = finite_game.make("pro", batch=3)
    duels = finite_game.make("pro", batch=3)[1].act(env.reset(seed=0)[0])
    with pytest.raises(ValueError, match="expected scores of the duels of its last act, got no act before"):
        agent.learn(duels.judged(np.ones(3), scores=np.zeros((3, 2))))
    agent.act(duels.pair.observation)
    with pytest.raises(ValueError, match="got no scores"):
        agent.learn(duels.judged(np.ones(3)))


def test_a_length_of_one_is_refused(finite_game):
    with pytest.raises(ValueError, match="at least 2"):
        finite_game.make("pro", length=1)
