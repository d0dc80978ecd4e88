"""RDO: weights from score gaps."""

import numpy as np
import torch


def learn_both(game, scores_of):
    """log-probs of the pairs after one round of RDO and of online DPO on the same labels, and RDO's metrics."""
    env, agent = game.make("rdo", batch=8)
    _, other = game.make("online_dpo", batch=8)
    observation, _ = env.reset(seed=0)
    duels = agent.act(observation)
    assert other.act(observation).pair.responses.tolist() == duels.pair.responses.tolist()
    same = duels.pair.responses[:, 0] == duels.pair.responses[:, 1]
    labels = np.where(same, 0.5, np.arange(8) % 2)
    learnt = agent.update(duels.judged(labels, scores=scores_of(labels)))
    other.update(duels.judged(labels))
    return agent.policy.log_prob(duels.pair), other.policy.log_prob(duels.pair), learnt


def test_equal_gaps_are_online_dpo(finite_game):
    mine, theirs, learnt = learn_both(finite_game, lambda labels: np.stack([labels * 3, (1 - labels) * 3], 1))
    torch.testing.assert_close(mine, theirs)
    assert learnt["zero_weight"] == 0


def test_gaps_matter_and_a_label_against_the_scores_weighs_nothing(finite_game):
    def scores(labels):
        wins = np.stack([labels, 1 - labels], 1) * np.arange(1, 9)[:, None]
        wins[:4] *= -1
        return wins

    mine, theirs, learnt = learn_both(finite_game, scores)
    assert (mine - theirs).abs().max() > 1e-4
    assert 0 < learnt["zero_weight"] < 1


def test_resumes_exactly_and_charges_what_it_asks(finite_game, tmp_path):
    log = finite_game.check_resume("rdo", tmp_path / "saved", rounds=(2, 2))
    for duels, preferences, _ in log:
        charged = duels.pair.responses[:, 0] != duels.pair.responses[:, 1]
        assert (np.isfinite(preferences.scores).all(axis=1) == charged).all()
