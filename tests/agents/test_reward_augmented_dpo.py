"""Reward-augmented DPO: what a pair becomes, and under which prompt."""

from dataclasses import replace

import numpy as np
import pytest

from llm_duel_env.tasks.tiny_language import with_control
from llm_duel_env.tasks.tiny_tldr import conditioned
from llm_duel_env.types import Candidates, Preferences

SETTINGS = {"scores": [0.0, 2.5]}


def made_up(game, labels, scores):
    """Preferences about the prompts 0, 1, ... with responses "a<row>" and "b<row>" that carry token ids."""
    count = len(labels)
    responses = np.array([[f"a{row}", f"b{row}"] for row in range(count)], object)
    tokens = np.arange(count * 4).reshape(count, 2, 2)
    pair = Candidates(game.task.observe(np.arange(count)), responses, tokens, np.full((count, 2), 2))
    return Preferences(pair, np.array(labels, np.float32), np.ones(count, bool), scores=np.array(scores, np.float32))


def test_each_pair_teaches_the_goal_of_either_side(tiny_game):
    _, agent = tiny_game.make("reward_augmented_dpo", **SETTINGS)
    told = made_up(
        tiny_game,
        [1, 0, 1, 0.5, np.nan, 1, 0],
        #  goals 8, 2;  1, 10;   4, 4 (one goal);  tie;  unlabelled;  against the label;  cut off at 0 and 10
        [[2, 0.5], [0.25, 2.5], [1.0, 0.95], [1, 1], [2, 1], [0.5, 2.0], [-7, 99]],
    )
    ranked = agent.augmented(told)
    posts = told.pair.observation["prompt"]
    wanted = [
        (f"<goal_{goal}>", row, [first, second])
        for goal, row, first, second in (
            (8, 0, "a0", "b0"), (10, 1, "b1", "a1"), (4, 2, "a2", "b2"), (10, 6, "b6", "a6"),
            (2, 0, "b0", "a0"), (1, 1, "a1", "b1"), (0, 6, "a6", "b6"),
        )
    ]  # fmt: skip
    assert [(with_control(posts[row], token), pair) for token, row, pair in wanted] == list(
        zip(ranked.observation["prompt"], ranked.responses.tolist())
    )
    assert ranked.observation["prompt_id"].tolist() == [0, 1, 2, 6, 0, 1, 6]
    by_text = dict(zip(told.pair.responses.ravel(), told.pair.tokens.reshape(-1, 2).tolist()))
    assert [[by_text[r] for r in row] for row in ranked.responses] == ranked.tokens.tolist()


def test_it_acts_and_deploys_under_the_highest_goal_and_shows_the_plain_prompt(tiny_game):
    env, agent = tiny_game.make("reward_augmented_dpo", batch=3, **SETTINGS)
    observation, _ = env.reset(seed=0)
    best = conditioned(observation, ["goal_10"] * 3)
    duels = agent.act(observation)
    assert duels.pair.observation["prompt"] == observation["prompt"]
    assert duels.pair.responses.tolist() == agent.policy.sample(best, 2, ("act", 0)).responses.tolist()
    assert agent.respond(observation).tolist() == agent.policy.greedy(best).responses[:, 0].tolist()
    assert agent.diagnose(observation) == agent.policy.diagnose(best, ("diagnose",))


def test_one_goal_for_all_is_online_dpo_on_prompts_that_say_so(tiny_game):
    settings = {"loss": "dpo", "loss_options": {}, "beta": 0.1}
    _, agent = tiny_game.make("reward_augmented_dpo", scores=[-1e6, 0.0], **settings)
    _, other = tiny_game.make("online_dpo", beta=0.1)
    observation = tiny_game.task.observe(np.arange(3))
    pair = other.policy.sample(observation, 2, ("pairs",))
    judged = Preferences(pair, np.array([1, 0, 1], np.float32), np.ones(3, bool))
    mine = agent.update(replace(judged, scores=np.array([[2, 1], [1, 2], [2, 1]], np.float32)))
    goal = replace(pair, observation=conditioned(observation, ["goal_10"] * 3))
    assert mine == other.update(replace(judged, pair=goal))


def test_two_rounds_and_a_resume(tiny_game, tmp_path):
    log = tiny_game.check_resume("reward_augmented_dpo", tmp_path / "saved", batch=3, **SETTINGS)
    for _, preferences, learnt in log:
        decided = int(np.isin(preferences.first_wins, (0, 1)).sum())
        assert decided <= learnt.get("pairs", 0) <= 2 * decided


def test_other_tasks_are_refused(finite_game):
    with pytest.raises(ValueError, match="plays text tasks only"):
        finite_game.make("reward_augmented_dpo")


def test_conditions_that_do_not_exist_are_refused(tiny_game):
    with pytest.raises(ValueError, match="expected a control token"):
        conditioned(tiny_game.task.observe(np.arange(1)), ["goal_11"])
