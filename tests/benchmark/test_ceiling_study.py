"""What a policy reaches that is told every utility."""

import numpy as np
import pytest
import torch

from llm_duel_env.benchmark import ceiling_study
from llm_duel_env.tasks import make_task


def test_the_losses_are_those_of_sums_over_pairs():
    draw = np.random.default_rng(0)
    scores, utility = draw.normal(size=(3, 4)), draw.normal(size=(3, 4))
    utility[0, 1] = utility[0, 2]  # a tie
    wins, likelihood = [], []
    for s, u in zip(scores, utility):
        probability = np.exp(s) / np.exp(s).sum()
        for i in range(4):
            for j in range(4):
                wins.append(probability[i] * (1.0 if u[i] > u[j] else 0.5 if u[i] == u[j] else 0.0) / 4)
                preferred, modelled = 1 / (1 + np.exp(u[j] - u[i])), 1 / (1 + np.exp(s[j] - s[i]))
                likelihood.append(preferred * np.log(modelled))
    given = torch.from_numpy(scores), torch.from_numpy(utility)
    assert ceiling_study.expected_wins(*given).item() == pytest.approx(1 - sum(wins) / 3, abs=1e-12)
    assert ceiling_study.all_pairs(*given).item() == pytest.approx(-np.mean(likelihood), abs=1e-12)


@pytest.mark.parametrize("loss", ceiling_study.LOSSES.values(), ids=ceiling_study.LOSSES)
def test_told_everything_a_policy_gets_far_on_prompts_it_has_not_seen(loss):
    task = make_task("synthetic", candidates=8, train_prompts=256, heldout_prompts=64)
    found = ceiling_study.taught(task, loss, 1e-2, passes=20)
    assert found.shape == (20,)
    assert found[-1] > 0.85
    assert found[-1] > found[0]
    np.testing.assert_array_equal(found[:2], ceiling_study.taught(task, loss, 1e-2, passes=2))


def test_utilities_are_the_oracles_logits():
    task = make_task("synthetic", candidates=4, oracle_scale=3.0)
    observation = task.observe(np.arange(5))
    found = ceiling_study.utilities(task, observation)
    assert found.shape == (5, 4)
    first, second = np.zeros(5, int), np.full(5, 3)
    probability = task.oracle.win_probability(observation, first, second)
    np.testing.assert_allclose((found[:, 0] - found[:, 3]).sigmoid(), probability, atol=1e-6)


def test_the_table_has_a_row_for_each_loss():
    task = make_task("synthetic", candidates=4, train_prompts=64, heldout_prompts=32)
    lines = ceiling_study.report([task, task], passes=1)
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["expected wins", "all pairs"]
    assert lines[-1] == "1 passes over 64 training prompts; 2 task(s)."
