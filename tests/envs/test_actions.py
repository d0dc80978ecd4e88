import copy

import numpy as np
import pytest

from llm_duel_env.envs.duel_env import DuelEnv
from llm_duel_env.envs.vector_env import DuelVectorEnv

ONES = np.ones(2, np.int64)
TEXT = {"first": ("a", "b"), "second": ("c", "d"), "query": ONES}
FINITE = {"first": np.array([0, 1]), "second": np.array([2, 3]), "query": ONES}
BAD = [
    ("text", [("a", "c"), ("b", "d")], TypeError, "list of pairs"),
    ("text", (("a", "b"), ("c", "d")), TypeError, "list of pairs"),
    ("text", None, TypeError, "NoneType"),
    ("text", {**TEXT, "first": [("a", "c"), ("b", "d")]}, TypeError, r"first\[0\]: expected a str, got tuple"),
    ("text", {**TEXT, "first": "ab"}, TypeError, "first: expected a sequence of 2, got str"),
    ("text", {**TEXT, "first": None}, TypeError, "first: expected a sequence"),
    ("text", {**TEXT, "second": ("c", None)}, TypeError, r"second\[1\]: expected a str"),
    ("text", {**TEXT, "second": ("c", 3)}, TypeError, r"second\[1\]: expected a str"),
    ("text", {**TEXT, "first": ("a",)}, ValueError, "first: expected 2 values, one per prompt, got 1"),
    ("text", {**TEXT, "first": ("a", "b", "c")}, ValueError, "first: expected 2 values"),
    ("text", {**TEXT, "first": ("a", "")}, ValueError, r"first\[1\]: expected 1 to 30 characters, got 0"),
    ("text", {**TEXT, "first": ("a", "b" * 31)}, ValueError, "got 31"),
    ("text", {**TEXT, "first": ("a", "\ud800")}, ValueError, "surrogates"),
    ("text", {"first": ("a", "b"), "query": ONES}, ValueError, "got keys"),
    ("text", {"second": ("a", "b"), "query": ONES}, ValueError, "got keys"),
    ("text", {**TEXT, "querry": ONES}, ValueError, "got keys"),
    ("text", {**TEXT, "query": np.array([1, 2])}, ValueError, r"query\[1\]: expected 0 to 1, got 2"),
    ("text", {**TEXT, "query": np.array([-1, 1])}, ValueError, "query"),
    ("text", {**TEXT, "query": np.ones(2)}, TypeError, r"query\[0\]: expected an integer, got float64"),
    ("text", {**TEXT, "query": np.ones(3, np.int64)}, ValueError, "query: expected 2 values"),
    ("text", {**TEXT, "query": 1}, TypeError, "query: expected a sequence"),
    ("finite", {**FINITE, "first": np.array([0, 5])}, ValueError, r"first\[1\]: expected 0 to 4, got 5"),
    ("finite", {**FINITE, "second": np.array([-1, 0])}, ValueError, r"second\[0\]: expected 0 to 4, got -1"),
    ("finite", {**FINITE, "first": np.array([0.0, 1.0])}, TypeError, "expected an integer"),
    ("finite", {**FINITE, "first": np.zeros((2, 2), np.int64)}, TypeError, "expected an integer, got ndarray"),
    ("finite", {**FINITE, "first": ("a", "b")}, TypeError, "expected an integer, got str"),
    ("finite", np.zeros((2, 2), np.int64), TypeError, "ndarray"),
]


@pytest.mark.parametrize(("kind", "action", "error", "message"), BAD)
def test_a_malformed_action_is_refused_and_changes_nothing(
    finite_task, text_task, counting_oracle, tmp_path, kind, action, error, message
):
    task = (text_task if kind == "text" else finite_task)(oracle=counting_oracle())
    env = DuelVectorEnv(2, task=task, budget=4, ledger=tmp_path / "ledger.jsonl")
    before, _ = env.reset(seed=1)
    before, state, written = copy.deepcopy(before), env.state_dict(), (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(error, match=message):
        env.step(action)
    after = env.observe()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert env.state_dict() == state
    assert task.oracle.calls == 0
    assert (tmp_path / "ledger.jsonl").read_bytes() == written
    env.close()


@pytest.mark.parametrize("action", [("a", "b"), {"first": ("a",), "second": ("b",), "query": 1}, {"first": "a"}, None])
def test_so_does_the_single_environment(text_task, action):
    env = DuelEnv(task=text_task())
    env.reset(seed=1)
    with pytest.raises((TypeError, ValueError), match="expected"):
        env.step(action)
    assert env.round == env.query_count == 0


@pytest.mark.parametrize(
    ("kind", "action"),
    [
        ("text", {"first": ["a", "é"], "second": np.array(["c", "d"], object)}),
        ("text", {"first": np.array(["a", "b"]), "second": ("c", "d"), "query": [True, 1]}),
        ("finite", {"first": [0, 1], "second": np.array([2, 3], np.int32)}),
    ],
)
def test_what_means_the_same_is_taken_and_query_defaults_to_one(finite_task, text_task, kind, action):
    env = DuelVectorEnv(2, task=text_task() if kind == "text" else finite_task())
    env.reset(seed=1)
    env.step(action)
    assert env.query_count == 2


def test_an_empty_response_where_the_space_allows_it(text_task):
    env = DuelVectorEnv(1, task=text_task(min_length=0))
    env.reset(seed=1)
    assert env.step({"first": ("",), "second": ("a",)})[4]["preference"].tolist() == [0]
