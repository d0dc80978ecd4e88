"""A prompt that is kept for another duel."""

import json

import numpy as np
import pytest

from llm_duel_env.envs.duel_env import DuelEnv
from llm_duel_env.envs.vector_env import DuelVectorEnv
from llm_duel_env.types import Candidates, Duels

PAIR = {"first": [1, 2, 3], "second": [0, 0, 0]}


def make(task, **kwargs):
    env = DuelVectorEnv(3, task=task, **kwargs)
    return env, env.reset(seed=4)[0]["prompt_id"].tolist()


def step(env, again=None, query=(1, 1, 1)):
    action = {**PAIR, "query": np.array(query)}
    observation, _, _, _, info = env.step(action if again is None else {**action, "again": np.array(again)})
    return observation["prompt_id"].tolist(), info


def test_a_kept_prompt_stands_where_it_stood_and_no_prompt_is_lost(finite_task):
    env, first = make(finite_task(train_prompts=40), budget=50)
    plain = make(finite_task(train_prompts=40))[0]
    order = first + [prompt for _ in range(4) for prompt in step(plain)[0]]
    second, info = step(env, [0, 1, 1])
    assert second == [order[3], *first[1:]]
    third, _ = step(env, [1, 1, 0], query=(0, 1, 1))  # an abstained prompt can be kept, and one be kept twice
    assert third == [order[3], first[1], order[4]]
    fourth, info = step(env)
    assert fourth == order[5:8]
    assert info["query_count"].tolist() == [8, 8, 8]  # each of three duels about one prompt was charged


def test_without_again_nothing_changes(finite_task):
    (env, _), (other, _) = make(finite_task(train_prompts=5)), make(finite_task(train_prompts=5))
    for _ in range(4):
        assert step(env)[0] == step(other, [0, 0, 0])[0]
    assert env.state_dict() == other.state_dict()


def test_a_state_remembers_what_is_kept(finite_task, tmp_path):
    env, _ = make(finite_task(), budget=50, ledger=tmp_path / "ledger.jsonl")
    step(env)
    kept, _ = step(env, [1, 0, 1])
    state = json.loads(json.dumps(env.state_dict()))
    expected = [step(env, [0, 1, 0])[0], step(env)[0]]
    env.close()
    other, _ = make(finite_task(), budget=50, ledger=tmp_path / "ledger.jsonl")
    other.load_state_dict(state)
    assert other.observe()["prompt_id"].tolist() == kept
    assert [step(other, [0, 1, 0])[0], step(other)[0]] == expected
    other.reset(seed=4)
    assert other.observe()["prompt_id"].tolist() == make(finite_task())[1]
    del state["kept"]  # as earlier versions wrote it
    other.load_state_dict(state)
    assert other.state_dict()["kept"] == []
    other.close()


def test_one_prompt_at_a_time(finite_task):
    env = DuelEnv(task=finite_task())
    prompt = env.reset(seed=0)[0]["prompt_id"]
    pair = {"first": 1, "second": 2, "query": 1}
    assert env.step({**pair, "again": 1})[0]["prompt_id"] == prompt
    assert env.step({**pair, "again": 0})[0]["prompt_id"] != prompt


def test_what_is_no_action_changes_nothing(finite_task):
    env, _ = make(finite_task())
    state = env.state_dict()
    with pytest.raises(ValueError, match=r"again\[1\]: expected 0 to 1, got 2"):
        step(env, [0, 2, 0])
    with pytest.raises(ValueError, match="again: expected 3 values"):
        step(env, [0, 1])
    assert env.state_dict() == state
    step(env, [1, 0, 0])
    with pytest.raises(ValueError, match="expected 3 prompts, as in the round before"):
        env.core.prompt_ids(2)


def test_duels_say_it():
    pair = Candidates({"prompt_id": np.arange(2)}, np.array([[0, 1], [1, 0]]))
    assert Duels(pair).action()["again"].tolist() == [0, 0]
    assert Duels(pair, again=np.array([True, False])).action()["again"].tolist() == [1, 0]
