"""What agents tell people about their duels: why a pair was chosen, and what they believed before the label."""

import numpy as np
import pytest

from llm_duel_env.benchmark.registry import load_agent
from llm_duel_env.tasks import make_task

M = 6
TASK = make_task("synthetic", candidates=12, train_prompts=50, heldout_prompts=10)
ERM = {"reward_model.members": 3, "reward_model.hidden": 8, "candidates": 5}
SAID = [
    ("sea", ERM, "Thompson winner of member"),
    ("sea", {**ERM, "opponent": "ee"}, "asked in turn"),
    ("sea", {**ERM, "opponent": "uncertainty"}, "disagree about most"),
    ("passive", ERM, "as they came"),
    ("best_vs_worst", ERM, "highest against the lowest"),
    ("sea_as_released", ERM, "Thompson winner of member"),
    ("best_of_n", ERM, "policy frozen"),
    ("online_dpo", {}, "two samples of the present policy"),
    ("offline_dpo", {}, "reference policy"),
    ("xpo", {}, "against one of the reference"),
    ("vpo", {}, "two samples of the present policy"),
    ("nash_md", {}, "mixture with the reference"),
    ("selm", {}, "two samples of the policy meet first"),
    ("real", {}, "has cosine"),
    ("apl", {}, "implicit reward margin"),
    ("linear_ts", {}, "one draw of theta"),
]
BELIEVE = {"sea", "passive", "best_vs_worst", "sea_as_released", "best_of_n", "apl", "linear_ts"}


def made(name, settings):
    agent_class = load_agent(name)
    return agent_class(TASK.view(), agent_class.configure(settings), seed=0, budget=40)


@pytest.mark.parametrize(("name", "settings", "said"), SAID)
def test_every_duel_has_its_reason(name, settings, said):
    agent = made(name, settings)
    duels = agent.act(TASK.observe(np.arange(M)))
    assert len(duels.notes.reason) == M
    assert all(said in reason for reason in duels.notes.reason)
    assert (duels.notes.belief is not None) == (name in BELIEVE)
    if duels.notes.belief is not None:
        assert duels.notes.belief.shape == (M,)
        assert ((duels.notes.belief >= 0) & (duels.notes.belief <= 1)).all()


def test_seas_belief_is_its_members_opinion_of_the_pair_shown():
    agent = made("sea", ERM)
    notes = agent.act(TASK.observe(np.arange(M))).notes
    rewards = agent.reward_model(agent._features)  # (E, M, 2)
    chance = (rewards[:, :, 0] - rewards[:, :, 1]).sigmoid().numpy()
    np.testing.assert_allclose(notes.belief, chance.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(notes.spread, chance.std(axis=0), atol=1e-6)
    assert all("has learnt nothing yet" in reason for reason in notes.reason)
    members = {int(reason.split("member ")[1].split()[0]) for reason in notes.reason}
    assert members <= {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("sea", {}, "labels this pair itself: its best candidate against its worst"),
        ("sea", {"synthetic_pair": "thompson"}, "labels this pair itself: Thompson winner of member"),
        ("sea_as_released", {}, "chose this pair (model data): its best candidate against its worst"),
    ],
)
def test_a_pair_that_the_ensemble_labels_says_so(name, settings, said, monkeypatch):
    agent = made(name, {**ERM, **settings})
    monkeypatch.setattr(agent, "trusts_itself", lambda observation: np.arange(M) % 2 == 0)
    reasons = agent.act(TASK.observe(np.arange(M))).notes.reason
    assert [said in reason for reason in reasons] == [True, False] * (M // 2)
