"""Results say where they come from."""

import json
import subprocess

import gymnasium
from benchmark_helpers import WORLD, config, silent
from gymnasium.envs.registration import EnvSpec

from llm_duel_env.benchmark import machine, registry
from llm_duel_env.benchmark.origin import origin
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.run_folder import RunFolder, read_json
from llm_duel_env.benchmark.runner import run
from llm_duel_env.benchmark.stored import fitted


def test_a_result_holds_what_its_run_was(tmp_path):
    told = config(tmp_path / "run", budget=24)
    result = run(told, say=silent)
    spec = EnvSpec.from_json(json.dumps(result["env_spec"]))
    env = gymnasium.make_vec(spec, num_envs=8)
    assert env.unwrapped.budget == 24
    assert env.unwrapped.task.candidates == WORLD["task_kwargs"]["candidates"]
    env.close()
    assert result["agent_config"]["policy"]["learning_rate"] == 1e-2
    assert result["agent_config"]["beta"] == 0.1  # a default, which may be another tomorrow
    assert result["agent_source"]["class"] == "llm_duel_env.agents.online_dpo:OnlineDPO"
    assert result["agent_source"]["package"].startswith("llm-duel-env ")
    assert result["eval_every"] == told.eval_every
    assert result["sittings"] == 1
    stored = read_json(tmp_path / "run" / "versions.json")
    assert result["versions"] == {name: value for name, value in stored.items() if name != "fingerprint"}
    assert result["versions"]["threads"] >= 1
    assert len(result["versions"]["source_sha256"]) == 64
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result


def test_a_mark_that_ends_a_line_elsewhere_is_no_sitting(tmp_path):
    folder = RunFolder(tmp_path)
    for place in ("runs/a\u2028b", "runs/a\x85b"):
        folder.add_command(f"llm-duel run --agent sea --folder '{place}'")
    assert origin(RunConfig(agent="sea", env="duel/Synthetic-v0", folder=""), folder)["sittings"] == 2


def test_a_setting_that_json_does_not_know_costs_no_result(tmp_path, monkeypatch):
    class Odd:
        @staticmethod
        def configure(_overrides):
            return registry_config

    from dataclasses import dataclass

    @dataclass
    class Config:
        limit: float = float("inf")
        kind: object = int

    registry_config = Config()
    monkeypatch.setattr(registry, "load_agent", lambda name: Odd)
    found = origin(RunConfig(agent="odd", env="duel/Synthetic-v0", folder=""), RunFolder(tmp_path))
    assert found["agent_config"] == {"limit": None, "kind": "<class 'int'>"}
    assert "package" not in found["agent_source"]


def test_the_commit_is_this_package_s_own(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path / "package")
    assert machine._checkout() == {}  # installed inside somebody's checkout: its commit says nothing of us
    subprocess.run([*git, "add", "package"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    assert machine._checkout()["changed"] is False
    (tmp_path / "package" / "__init__.py").write_text("x = 1\n")
    told = machine._checkout()
    assert told["changed"] is True
    assert len(told["commit"]) == 40


def test_a_kept_result_leaves_out_first_what_can_be_made_again():
    curve = {"queries": list(range(100))}
    told = {"label": "a", "curve": curve, "env_spec": {"id": "x" * 300}, "agent_config": {"loss": "x" * 300}}
    sizes = [len(json.dumps({name: told[name] for name in names})) + 1 for names in (told, ("label", "curve"))]
    assert fitted(told, sizes[0]) == told
    assert fitted(told, sizes[0] - 1) == {"label": "a", "curve": curve, "agent_config": told["agent_config"]}
    assert fitted(told, sizes[1]) == {"label": "a", "curve": curve}
    assert fitted(told, sizes[1] - 1) == {"label": "a", "curve": {"queries": list(range(1, 100, 2))}}
