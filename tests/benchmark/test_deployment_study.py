import numpy as np
import pytest

from llm_duel_env.benchmark import deployment_study
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.runner import run


def played(folder, agent, **settings):
    small = {"task_kwargs": {"candidates": 8, "train_prompts": 200, "heldout_prompts": 300}}
    config = RunConfig(
        agent, "duel/Synthetic-v0", str(folder), budget=200, eval_every=1.0, env_kwargs=small, **settings
    )
    run(config, say=lambda line: None)
    return folder


def test_what_is_deployed_is_the_run_s_own_and_the_best_sample_is_the_best(tmp_path):
    folder = played(
        tmp_path / "sea" / "seed-0", "sea", overrides={"reward_model.start": 16, "policy.learning_rate": 0.05}
    )
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = deployment_study.examine(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert 0.5 < found["greedy"] < 1
    assert found["best sample"] >= max(found["samples"], found["ensemble's choice"])
    assert 1 / 8 < found["mode's share"] < 1
    assert 0 < found["better samples"] < 1 - found["mode's share"]
    assert all(0 <= value <= 1 for value in found.values() if not np.isnan(value))
    lines = deployment_study.table([("a", {**found, "greedy": 0.9}), ("b", {**found, "greedy": 0.8})])
    assert [line[:3] for line in lines[2:4]] == ["| b", "| a"]


def test_other_agents_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a run with a checkpoint, found none"):
        deployment_study.examine(tmp_path)
    folder = played(tmp_path / "run", "uniform")
    with pytest.raises(ValueError, match=r"expected an agent with best_of_n .*, got uniform"):
        deployment_study.examine(folder)
