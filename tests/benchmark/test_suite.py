"""Suites and recipes: data in, checked runs out."""

import pytest
import yaml

from llm_duel_env.benchmark import recipes, registry, suite
from llm_duel_env.benchmark.run_config import list_envs

SUITE = """
name: two
entries:
  - env: duel/Synthetic-v0
    env_kwargs: {task_kwargs: {candidates: 8}}
    agents:
      slow: {agent: online_dpo, overrides: {policy.learning_rate: 1e-4}}
      uniform:
    seeds: [3, 5]
    budget: 50
    batch: 4
  - {env: duel/Synthetic-v0, agents: [sea], seeds: 2, budget: 60}
"""


def test_a_suite_expands_to_runs_with_folders_of_their_own():
    runs = suite.expand(yaml.safe_load(SUITE), "out")
    assert [(run.agent, run.label, run.seed, run.budget) for run in runs] == [
        ("online_dpo", "slow", 3, 50),
        ("online_dpo", "slow", 5, 50),
        ("uniform", "uniform", 3, 50),
        ("uniform", "uniform", 5, 50),
        ("sea", "sea", 0, 60),
        ("sea", "sea", 1, 60),
    ]
    assert runs[0].folder == "out/Synthetic-v0-task_kwargs-candidates-8/slow/seed-3"
    assert runs[-1].folder == "out/Synthetic-v0/sea/seed-1"
    assert len({run.folder for run in runs}) == 6
    assert (runs[0].batch, runs[0].overrides["policy.learning_rate"]) == (4, "1e-4")


@pytest.mark.parametrize("name", suite.list_suites())
def test_the_suites_of_the_package_can_be_run(name):
    runs = suite.load_suite(name, "out")
    assert runs


def test_the_demo_is_what_the_readme_promises():
    runs = suite.load_suite("demo", "out")
    assert {(run.env, run.label) for run in runs} == {
        (env, agent)
        for env in ("duel/TinyTLDR-v0", "duel/Synthetic-v0")
        for agent in ("uniform", "offline_dpo", "online_dpo", "sea")
    }
    assert {(run.env, run.budget) for run in runs} == {("duel/TinyTLDR-v0", 2000), ("duel/Synthetic-v0", 1000)}
    assert {run.seed for run in runs if run.env == "duel/Synthetic-v0"} == set(range(5))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"agents": ["see"]}, "Did you mean 'sea'"),
        ({"env": "duel/Tiny-v0"}, "duel/TinyTLDR-v0"),
        ({"seeds": 0}, "seeds"),
        ({"budget": -3}, "budget"),
        ({"colour": 1}, "colour"),
        ({"agents": {"x": {"agent": "sea", "overrides": {"candidate": 3}}}}, "no field 'candidate'"),
        ({"agents": {"x": {"overide": 3}}}, "overide"),
    ],
)
def test_a_bad_entry_is_named(change, said):
    entry = {"env": "duel/Synthetic-v0", "agents": ["uniform"], "seeds": 1, "budget": 10} | change
    with pytest.raises(ValueError, match=r"suite bad, entry 0") as error:
        suite.expand({"name": "bad", "entries": [entry]}, "out")
    assert said in str(error.value)


def test_the_same_run_twice_is_refused():
    entry = {"env": "duel/Synthetic-v0", "agents": ["uniform"], "seeds": 1, "budget": 10}
    with pytest.raises(ValueError, match="twice"):
        suite.expand({"name": "bad", "entries": [entry, entry]}, "out")
    with pytest.raises(ValueError, match="Did you mean 'demo'"):
        suite.load_suite("demos", "out")


def test_every_recipe_sets_fields_that_exist():
    for env in list_envs():
        for agent in registry.list_agents():
            registry.load_agent(agent).configure(recipes.recipe_of(env, agent))


def test_a_recipe_differs_from_the_paper_where_it_says_so():
    agent = registry.load_agent("sea")
    told = agent.configure({"policy.learning_rate": 0.5, "candidates": 7})
    assert recipes.difference(told, agent.configure({})) == {
        "policy.learning_rate": (5e-7, 0.5),
        "candidates": (20, 7),
    }


def test_unknown_agents_are_answered_with_the_known():
    with pytest.raises(registry.UnknownNameError, match=r"Did you mean 'online_dpo'.*offline_dpo"):
        registry.load_agent("onlin_dpo")
    assert {"sea", "online_dpo", "offline_dpo", "uniform"} <= set(registry.list_agents())
    assert set(registry.list_losses()) >= {"dpo", "ipo", "slic"}
