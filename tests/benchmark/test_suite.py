"""Suites and recipes: data in, checked runs out."""

import json

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


ENTRY = {"env": "duel/Synthetic-v0", "agents": ["uniform"], "seeds": 1, "budget": 10}


def told(runs):
    """Task's folder, label and overrides of each label's first seed."""
    return [(run.folder.split("/")[1], run.label, run.overrides) for run in runs if run.seed == 0]


def expanded(**suite_):
    return suite.expand({"name": "made", **suite_}, "out")


def test_an_entry_takes_several_tasks_and_says_more_than_they_do():
    tasks = {"noisy": {"env": "duel/Synthetic-v0", "env_kwargs": {"flip_rate": 0.1}, "seeds": 3, "budget": 50}}
    entry = {"tasks": ["noisy", "tiny-tldr"], "agents": ["uniform"], "seeds": 2, "env_kwargs": {"tie_margin": 0.1}}
    runs = expanded(tasks=tasks, entries=[entry])
    assert [(run.env, run.env_kwargs, run.seed, run.budget, run.eval_prompts) for run in runs] == [
        ("duel/Synthetic-v0", {"flip_rate": 0.1, "tie_margin": 0.1}, 0, 50, 512),
        ("duel/Synthetic-v0", {"flip_rate": 0.1, "tie_margin": 0.1}, 1, 50, 512),
        ("duel/TinyTLDR-v0", {"tie_margin": 0.1}, 0, 2000, 256),
        ("duel/TinyTLDR-v0", {"tie_margin": 0.1}, 1, 2000, 256),
    ]


def test_variants_take_a_recipe_of_their_own_and_one_without_settings_is_the_agent(monkeypatch):
    table = {"sea": {"beta": 0.2, "candidates": 7}, "sea+ipo": {"candidates": 9}, "online_dpo": {"beta": 0.3}}
    monkeypatch.setattr(recipes, "_table", lambda name: table)
    agents = {"sea": {}, "other": {"agent": "uncertainty", "recipe": "sea"}}
    variants = {"dpo": {}, "ipo": {"loss": "ipo", "beta": 0.4}}
    assert told(expanded(entries=[ENTRY | {"agents": agents, "variants": variants}])) == [
        ("Synthetic-v0", "sea", {"beta": 0.2, "candidates": 7}),
        ("Synthetic-v0", "sea+ipo", {"beta": 0.4, "candidates": 9, "loss": "ipo"}),
        ("Synthetic-v0", "other", {"beta": 0.2, "candidates": 7}),
        ("Synthetic-v0", "other+ipo", {"beta": 0.4, "candidates": 9, "loss": "ipo"}),
    ]
    assert told(expanded(entries=[ENTRY | {"agents": ["sea"], "recipe": False}]))[0][2] == {}


def test_a_recipe_may_be_named_and_must_exist():
    entry = ENTRY | {"agents": ["sea"]}
    (named,) = expanded(entries=[entry | {"recipe": "tiny_tldr"}])
    assert named.overrides == recipes.recipe_of("duel/TinyTLDR-v0", "sea") != {}
    with pytest.raises(ValueError, match=r"expected one of .*'synthetic', 'tiny_tldr'.*, got 'nobody'"):
        expanded(entries=[entry | {"recipe": "nobody"}])


def test_an_environment_s_setting_is_swept():
    entry = ENTRY | {
        "env_kwargs": {"task_kwargs": {"candidates": 8}},
        "env_sweep": {"task_kwargs.oracle_scale": [1, 2]},
    }
    assert [run.env_kwargs for run in expanded(entries=[entry])] == [
        {"task_kwargs": {"candidates": 8, "oracle_scale": 1}},
        {"task_kwargs": {"candidates": 8, "oracle_scale": 2}},
    ]


def test_a_suite_includes_others_and_may_play_them_elsewhere():
    whole = suite.load_suite("spine-synthetic", "out")
    assert expanded(include=["spine-synthetic", "spine-synthetic"]) == whole
    part = {"suite": "spine-synthetic", "only": ["sea*", "online_dpo"], "without": ["sea-ee"], "tasks": ["tiny-tldr"]}
    runs = expanded(include=[part])
    assert {(run.env, run.label, run.budget) for run in runs} == {
        ("duel/TinyTLDR-v0", "sea", 2000),
        ("duel/TinyTLDR-v0", "online_dpo", 2000),
    }
    assert runs[0].overrides == recipes.recipe_of("duel/TinyTLDR-v0", "sea")
    # What is included may be played on tasks that only the outer suite names, and through suites in between.
    tasks = {"few": {"env": "duel/Synthetic-v0", "env_kwargs": {"flip_rate": 0.1}, "seeds": 1, "budget": 9}}
    runs = expanded(tasks=tasks, include=[{"suite": "ablation", "tasks": ["few"], "only": ["3-sea"]}])
    assert [(run.label, run.budget, run.env_kwargs) for run in runs] == [("3-sea", 9, {"flip_rate": 0.1})]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": ["nowhere"]}, "'tiny-tldr'.*got 'nowhere'"),
        ({"tasks": ["tiny-tldr"], "env": "duel/Synthetic-v0"}, "in the place of 'env'"),
        ({"env": "duel/Synthetic-v0", "variants": ["ipo"]}, "variants: expected settings by name"),
        ({"env": "duel/Synthetic-v0", "env_sweep": {"flip_rate": 0.1}}, "env_sweep: expected one setting with a list"),
        ({"env": "duel/Synthetic-v0", "recipe": 3}, "recipe: expected true, false or the name"),
        ({}, "expected .*'env'"),
    ],
)
def test_a_bad_use_of_tasks_is_named(change, said):
    entry = {name: value for name, value in ENTRY.items() if name != "env"} | change
    with pytest.raises(ValueError, match=rf"suite made, entry 0: .*{said}"):
        expanded(entries=[entry])


def test_a_bad_include_is_named(tmp_path, monkeypatch):
    for part, said in (
        ("nowhere", "no suite is called 'nowhere'"),
        ({"tasks": ["pool"]}, "include: expected a suite's name"),
        ({"suite": "spine-synthetic", "only": ["sae"]}, "include spine-synthetic: no run is named by 'sae'"),
    ):
        with pytest.raises(ValueError, match=said):
            expanded(include=[part])
    with pytest.raises(ValueError, match=r"two different runs would go to out/Synthetic-v0/sea/seed-0"):
        expanded(include=["spine-synthetic"], entries=[ENTRY | {"agents": ["sea"]}])
    monkeypatch.chdir(tmp_path)
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).write_text(yaml.safe_dump({"name": name, "include": [other]}))
    with pytest.raises(ValueError, match="includes itself: a > b > a"):
        suite.load_suite("a", "out")
    with pytest.raises(ValueError, match="suite made: expected some of"):
        expanded(entries=[ENTRY], colour=1)


def test_runs_are_selected_by_task_and_label():
    runs = suite.load_suite("asynchrony", "out")

    def names(*patterns):
        return {(run.env[5:], run.label) for run in suite.select(runs, patterns)}

    assert names("tiny_tldr/online_dpo", "Synthetic-v0/sea") == {("TinyTLDR-v0", "online_dpo"), ("Synthetic-v0", "sea")}
    assert names("tiny-tldr/online_dpo") == {("TinyTLDR-v0", "online_dpo")}
    assert names("*-late") == {(e, f"{a}-late") for e, a in [("TinyTLDR-v0", "online-dpo"), ("Synthetic-v0", "sea"),
                                                            ("Synthetic-v0", "online-dpo")]}  # fmt: skip
    assert names("synthetic/*") == {("Synthetic-v0", run.label) for run in runs if run.env == "duel/Synthetic-v0"}
    assert suite.select(runs, ["*"]) == runs
    with pytest.raises(ValueError, match=r"named by 'pool/sea'; there are: Synthetic-v0/online_dpo"):
        suite.select(runs, ["pool/sea"])


def test_counting_looks_up_nothing(monkeypatch):
    whole = suite.load_suite("paper-sea", "out")
    monkeypatch.setattr(suite, "check", None)
    assert suite.planned("paper-sea", "out") == whole


def test_recipes_of_variants_set_fields_that_exist():
    for name in recipes._names():
        for agent, settings in recipes._table(name).items():
            registry.load_agent(agent.partition("+")[0]).configure(settings)


def test_quick_is_what_its_name_says():
    runs = suite.load_suite("quick", "out")
    assert len({run.label for run in runs}) == 8
    assert {(run.env, run.budget) for run in runs} == {("duel/Synthetic-v0", 3000)}
    assert {run.seed for run in runs} == set(range(5))


def test_the_study_of_sea_has_its_figures_and_controls_on_three_tasks():
    runs = suite.load_suite("paper-sea", "out")
    labels = {env: {run.label for run in runs if run.env == env} for env in {run.env for run in runs}}
    assert set(labels) == {"duel/Synthetic-v0", "duel/Pool-v0", "duel/TinyTLDR-v0"}
    methods = {"offline_dpo", "online_dpo", "apl", "xpo", "selm", "sea"}
    for found in labels.values():
        assert {f"{method}{loss}" for method in methods for loss in ("", "+ipo", "+slic")} <= found
        assert {label[0] for label in found if label[0].isdigit()} == set("24567")
        assert {"sea-ee", "uncertainty", "online_dpo_equal_steps", "online_dpo_equal_tokens"} <= found
        assert {"sea_as_released", "best_vs_worst"} <= found
    for run in runs:
        seeds = 5 if run.env == "duel/TinyTLDR-v0" else 10
        assert run.seed < seeds
        assert run.overrides.get("loss", "dpo") == (run.label.partition("+")[2] or "dpo")


def test_the_study_of_real_plays_four_rules_at_six_correlations():
    runs = suite.load_suite("paper-real", "out")
    on_synthetic = [run for run in runs if run.env == "duel/Synthetic-v0"]
    by_correlation = {}
    for run in on_synthetic:
        knob = run.env_kwargs.get("task_kwargs", {}).get("dissimilarity_correlation", 0.0)
        by_correlation.setdefault(knob, set()).add((run.label, run.budget))
    full = {(f"real{rule}", 1000) for rule in ("", "-random", "-similar", "-centroid")} | {("online_dpo", 1000)}
    assert set(by_correlation) == {-0.1, 0.0, 0.2, 0.4, 0.6, 0.8}
    assert all(found == full | {("real-350", 350), ("real-random-350", 350)} for found in by_correlation.values())
    on_pool = [run for run in runs if run.env == "duel/Pool-v0"]
    assert {run.env_kwargs["feedback"] for run in on_pool} == {"bernoulli"}
    assert {run.label for run in on_pool} == {label for label, _ in full}


def test_the_study_of_noise_plays_all_that_learn_from_duels_under_six_kinds():
    runs = suite.load_suite("noise", "out")
    kinds = {json.dumps(run.env_kwargs, sort_keys=True) for run in runs}
    assert kinds == {"{}", *(f'{{"flip_rate": {rate}}}' for rate in (0.1, 0.2, 0.3)), '{"feedback": "threshold"}',
                     '{"task_kwargs": {"preferences": "intransitive"}}'}  # fmt: skip
    board = {run.label for run in suite.load_suite("board-synthetic", "out")
             if not {"scores", "reward"} & registry.load_agent(run.agent).needs}  # fmt: skip
    for kind in kinds:
        assert {run.label for run in runs if json.dumps(run.env_kwargs, sort_keys=True) == kind} == board
