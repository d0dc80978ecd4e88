"""Scores: told to those who ask, counted, and to nobody else."""

import json

import numpy as np
import pytest

from llm_duel_env.benchmark.leaderboard import tables
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.runner import run
from llm_duel_env.envs.core import DuelCore
from llm_duel_env.envs.vector_env import DuelVectorEnv
from llm_duel_env.oracles.base import OracleError
from llm_duel_env.tasks import make_task
from llm_duel_env.types import Preferences

SMALL = {"task_kwargs": {"candidates": 12, "train_prompts": 64, "heldout_prompts": 16}}
ACTION = {"first": [0, 1, 2, 3], "second": [1, 1, 4, 5], "query": [1, 1, 0, 1]}


def small_task(**kwargs):
    return make_task("synthetic", candidates=12, train_prompts=64, heldout_prompts=16, **kwargs)


def test_they_are_the_oracles_utilities_of_what_was_charged(tmp_path):
    task = small_task(oracle_scale=0.5)
    env = DuelVectorEnv(4, task=task, scores=True, ledger=tmp_path / "with.jsonl")
    observation, _ = env.reset(seed=3)
    info = env.step(ACTION)[4]
    rows = np.array([0, 3])
    for column, name in enumerate(("first", "second")):
        wanted = 0.5 * task.utility({"prompt_id": observation["prompt_id"][rows]}, np.array(ACTION[name])[rows])
        np.testing.assert_allclose(info["scores"][rows, column], wanted)
    assert np.isnan(info["scores"][[1, 2]]).all()  # identical, and abstained
    assert info["evaluations"].tolist() == [2, 0, 0, 2]
    env.close()


def test_whoever_does_not_ask_gets_none_and_labels_are_the_same(tmp_path):
    found = []
    for scores in (True, False):
        env = DuelVectorEnv(4, task=small_task(), scores=scores, ledger=tmp_path / f"{scores}.jsonl")
        env.reset(seed=3)
        info = env.step(ACTION)[4]
        assert ("scores" in info) == ("evaluations" in info) == scores
        env.close()
        found.append((tmp_path / f"{scores}.jsonl").read_bytes())
    assert found[0] == found[1]


def test_an_oracle_without_a_utility_is_refused_and_nothing_is_spent(tmp_path):
    task = small_task(preferences="intransitive")
    assert "scores" not in task.view().provides
    env = DuelVectorEnv(4, task=task, scores=True, ledger=tmp_path / "ledger.jsonl")
    env.reset(seed=3)
    with pytest.raises(OracleError, match="compares pairs only"):
        env.step(ACTION)
    assert env.query_count == 0
    assert len(env.ledger) == 0
    env.close()


def play(agent, folder, **settings):
    settings = {"policy.learning_rate": 1e-2, **settings}
    config = RunConfig(
        agent=agent, env="duel/Synthetic-v0", folder=str(folder), budget=32, batch=8, overrides=settings,
        env_kwargs=SMALL, eval_every=1.0, eval_prompts=16,
    )  # fmt: skip
    return run(config, say=lambda line: None)


def test_a_run_tells_only_those_who_need_them_and_counts_evaluations(tmp_path, monkeypatch):
    seen, made = [], Preferences.__init__

    def watched(self, *args, **kwargs):
        made(self, *args, **kwargs)
        seen.append(self.scores)

    monkeypatch.setattr(Preferences, "__init__", watched)
    results = [play("rdo", tmp_path / "rdo")]
    assert any(scores is not None for scores in seen)
    seen.clear()
    monkeypatch.setattr(DuelCore, "_score", lambda *_: pytest.fail("the oracle was asked for scores"))
    results.append(play("online_dpo", tmp_path / "online_dpo"))
    assert seen
    assert all(scores is None for scores in seen)
    assert [result["evaluations"] for result in results] == [64, 0]
    assert [result["queries"] for result in results] == [32, 32]
    apart = tables(results)
    assert sorted((table.asks, table.rows[0].evaluations) for table in apart) == [((), None), (("scores",), 64.0)]


def test_poisoned_scores_change_those_who_need_them_and_nobody_else(tmp_path, monkeypatch):
    honest = DuelCore._score

    def lying(self, prompts, first, second):
        return tuple(-3 * column for column in honest(self, prompts, first, second))

    found = {}
    for name in ("rdo", "online_dpo"):
        for kind, score in (("honest", honest), ("lying", lying)):
            monkeypatch.setattr(DuelCore, "_score", score)
            found[name, kind] = play(name, tmp_path / f"{name}-{kind}")["curve"]["kl"]
    assert found["rdo", "honest"] != found["rdo", "lying"]
    assert found["online_dpo", "honest"] == found["online_dpo", "lying"]


def test_an_agent_that_needs_them_is_refused_where_there_are_none(tmp_path):
    kwargs = {"task_kwargs": SMALL["task_kwargs"] | {"preferences": "intransitive"}}
    config = RunConfig(agent="rdo", env="duel/Synthetic-v0", folder=str(tmp_path / "run"), env_kwargs=kwargs)
    with pytest.raises(ValueError, match=r"RDO needs \['scores'\], which task synthetic does not provide"):
        run(config)
    lines = (tmp_path / "run/ledger.jsonl").read_text().splitlines() if (tmp_path / "run/ledger.jsonl").exists() else []
    assert not any("label" in json.loads(line) for line in lines)
