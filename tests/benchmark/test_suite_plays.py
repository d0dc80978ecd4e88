"""Every entry of the suites that studies are made of starts and plays a few rounds, on a small world. Minutes."""

import dataclasses
import json

import numpy as np
import pytest
from benchmark_helpers import silent

from llm_duel_env.benchmark.runner import run
from llm_duel_env.benchmark.suite import planned
from llm_duel_env.pools import build_pool
from llm_duel_env.tasks.pool_files import Columns

STUDIES = ("quick", "standard", "ablation", "paper-sea", "paper-real", "noise", "tune-pool", "tune-paper-sea")
SMALL = {"candidates": 12, "train_prompts": 64, "heldout_prompts": 16}
QUERIES, BATCH = 24, 8


def small(entry):
    """A run of a suite on a small world and for three rounds."""
    env_kwargs = entry.env_kwargs
    if entry.env == "duel/Synthetic-v0":
        env_kwargs = {**env_kwargs, "task_kwargs": {**(env_kwargs.get("task_kwargs") or {}), **SMALL}}
    return dataclasses.replace(entry, env_kwargs=env_kwargs, budget=QUERIES, batch=BATCH, eval_every=1.0)


def distinct():
    """Each (environment, agent, overrides) once, whatever the learning rate, and each settings of an environment once
    more with online DPO."""
    found = {}
    for name in STUDIES:
        for entry in planned(name, "out"):
            if entry.env == "duel/TinyTLDR-v0":
                continue  # minutes each; that its settings exist is checked when the suite is read
            told = {name: value for name, value in entry.overrides.items() if name != "policy.learning_rate"}
            agent = json.dumps([entry.env, entry.agent, told], sort_keys=True)
            found.setdefault(agent, entry)
            if entry.agent == "online_dpo":
                found.setdefault(json.dumps([entry.env, entry.env_kwargs], sort_keys=True), entry)
    return list(found.values())


ENTRIES = distinct()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A pool of 40 prompts with 12 responses."""
    folder = tmp_path_factory.mktemp("pool")
    draw = np.random.default_rng(0)
    rows = [{"prompt": f"prompt {n}", "responses": [f"response {k} to {n}" for k in range(12)],
             "scores": draw.normal(size=12).round(2).tolist()} for n in range(40)]  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vectors = {"prompt": draw.normal(size=(40, 6)), "response": draw.normal(size=(40, 12, 6))}
    np.savez(folder / "vectors.npz", **vectors)
    source, given = str(folder / "data.jsonl"), folder / "vectors.npz"
    build_pool(source, folder / "pool", Columns(), embeddings=given, say=silent)
    return folder / "pool"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ENTRIES)), ids=lambda n: f"{ENTRIES[n].env[5:]}-{ENTRIES[n].label}")
def test_an_entry_plays(number, pool, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_DUEL_POOL", str(pool))
    result = run(dataclasses.replace(small(ENTRIES[number]), folder=str(tmp_path / "run")), say=silent)
    assert result["status"] == "finished"
    assert result["queries"] == QUERIES
    assert 0 <= result["curve"]["offline_win_rate"][-1] <= 1
