"""The board: its suites, what is kept of runs, and a tiny board from beginning to end."""

import csv
import json

import pytest
import yaml
from benchmark_helpers import WORLD

from llm_duel_env import cli
from llm_duel_env.benchmark import stored
from llm_duel_env.benchmark.docs import pages
from llm_duel_env.benchmark.leaderboard import tables
from llm_duel_env.benchmark.matched import matched
from llm_duel_env.benchmark.recipes import recipe_of
from llm_duel_env.benchmark.registry import list_agents, load_agent
from llm_duel_env.benchmark.report import board
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.suite import expand, load_suite
from llm_duel_env.tasks import make_task

TINY = {
    "name": "tiny",
    "entries": [
        {
            "env": "duel/Synthetic-v0",
            "env_kwargs": WORLD,
            "agents": ["uniform", "online_dpo", "rdo"],
            "seeds": 2,
            "budget": 24,
            "batch": 8,
            "eval_every": 0.5,
            "eval_prompts": 24,
        }
    ],
}


def agents_of(suite):
    return {run.agent for run in load_suite(suite, "out")}


def ours(kind, task):
    provides = make_task(task).view().provides
    agents = [name for name in list_agents() if load_agent(name).__module__.startswith("llm_duel_env.")]
    return {n for n in agents if kind in load_agent(n).kinds and load_agent(n).needs - {"reward"} <= provides}


CONTROLS = {"online_dpo_equal_tokens"}
"""Agents that stand in a study of their own in the place of the board."""


def test_every_agent_is_on_the_board():
    finite = agents_of("board-synthetic") | agents_of("board-synthetic-32")
    assert finite == ours("finite", "synthetic") - CONTROLS
    assert agents_of("board-tiny-tldr") == ours("text", "tiny_tldr") - CONTROLS
    assert agents_of("paper-sea") >= CONTROLS


@pytest.mark.parametrize("env", ["duel/Synthetic-v0", "duel/TinyTLDR-v0", "duel/Pool-v0"])
def test_controls_have_online_dpo_s_recipe_but_for_what_is_swept(env):
    rate, theirs = "policy.learning_rate", recipe_of(env, "online_dpo")
    for name in CONTROLS:
        own = recipe_of(env, name)
        assert own[rate] > 0
        assert own | {rate: None} == theirs | {rate: None}


def test_the_standard_suite_is_the_board_on_every_task():
    runs = load_suite("standard", "out")
    finite = agents_of("board-synthetic")
    assert {agent for agent in ours("finite", "synthetic") - CONTROLS if not agent.startswith("sb3_")} == finite
    for env, budget, agents in (
        ("duel/Synthetic-v0", 10_000, finite),
        ("duel/Pool-v0", 2000, finite),
        ("duel/TinyTLDR-v0", 2000, agents_of("board-tiny-tldr")),
    ):
        played = [run for run in runs if run.env == env]
        assert {run.agent for run in played} == agents
        assert {run.budget for run in played} == {budget}
    assert {run.batch for run in runs if run.env == "duel/Synthetic-v0"} == {64}


@pytest.mark.parametrize(
    ("tuned", "played"),
    [
        ("tune-board-synthetic", ("board-synthetic", "board-synthetic-32")),
        ("tune-board-tiny-tldr", ("board-tiny-tldr",)),
    ],
)
def test_every_learner_is_tuned_with_three_values_on_seeds_that_the_board_does_not_use(tuned, played):
    runs = load_suite(tuned, "out")
    learners = set().union(*(agents_of(suite) for suite in played)) - {"uniform"}
    assert {run.agent for run in runs} == learners
    seeds = {run.seed for run in runs}
    assert seeds.isdisjoint({run.seed for suite in played for run in load_suite(suite, "out")})
    for agent in learners:
        assert len({run.label for run in runs if run.agent == agent}) == 3
    assert {run.budget for run in runs} == {1000}


@pytest.mark.parametrize(("tuned", "env"), [("tune-pool", "duel/Pool-v0"), ("tune-standard", "duel/Synthetic-v0")])
def test_every_learner_of_the_standard_suite_is_tuned_alike(tuned, env):
    """As above, at the budget that is played."""
    runs, played = load_suite(tuned, "out"), [run for run in load_suite("standard", "out") if run.env == env]
    learners = {run.agent for run in played} - {"uniform"}
    assert {run.agent for run in runs} - CONTROLS == learners
    assert {run.seed for run in runs}.isdisjoint({run.seed for run in played})
    trials = {run.agent: {r.label for r in runs if r.agent == run.agent} for run in runs}
    assert {len(labels) for labels in trials.values()} == {3}
    for name in ("env", "env_kwargs", "budget", "batch"):
        assert {json.dumps(getattr(run, name)) for run in runs} == {json.dumps(getattr(run, name)) for run in played}


def test_every_variant_of_the_study_of_sea_is_tuned_alike():
    runs, tuned = load_suite("paper-sea", "out"), load_suite("tune-paper-sea", "out")
    for env in {run.env for run in runs}:
        wanted = {run.label for run in runs if run.env == env and "+" in run.label} | CONTROLS
        trials = [run.label.split("@")[0] for run in tuned if run.env == env and run.seed == 100]
        assert set(trials) == wanted
        assert {trials.count(label) for label in wanted} == {3}
    assert {run.seed for run in runs}.isdisjoint({run.seed for run in tuned})


def test_the_board_shares_the_runs_of_the_spine():
    def told(suite):
        names = ("label", "agent", "env", "env_kwargs", "seed", "budget", "batch", "eval_every", "eval_prompts")
        return {json.dumps([getattr(run, n) for n in names] + [run.overrides], sort_keys=True): run.label
                for run in load_suite(suite, "out")}  # fmt: skip

    assert set(told("spine-synthetic")) <= set(told("board-synthetic"))
    tiny = {key for key, label in told("spine-tiny-tldr").items() if label not in ("sea-ee", "sea-no-synthetic")}
    assert tiny <= set(told("board-tiny-tldr"))


def test_a_sweep_expands_to_labels_with_values():
    entry = {**TINY["entries"][0], "agents": ["online_dpo"], "seeds": [7], "sweep": {"beta": [0.1, 0.25]}}
    runs = expand({"name": "x", "entries": [entry]}, "out")
    assert [(run.label, run.overrides["beta"]) for run in runs] == [
        ("online_dpo@1e-1", 0.1),
        ("online_dpo@2.5e-1", 0.25),
    ]
    with pytest.raises(ValueError, match="one setting with a list"):
        expand({"name": "x", "entries": [{**entry, "sweep": {"beta": 0.1}}]}, "out")


def test_a_tiny_board_from_beginning_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    suite, results, out = tmp_path / "tiny.yaml", tmp_path / "results", tmp_path / "board.md"
    suite.write_text(yaml.safe_dump(TINY))
    bench = ["bench", str(suite), "--out", "runs", "--results", str(results), "--jobs", "1"]

    def command(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        assert end.value.code == 0
        return capsys.readouterr().out

    assert "6 results kept" in command(*bench)
    kept = sorted(results.rglob("*"))
    files = [path for path in kept if path.is_file()]
    assert sorted(path.name for path in files) == ["result.json"] * 6 + ["samples.jsonl"] * 6  # of seeds 0 and 1
    assert max(path.stat().st_size for path in files) <= stored.LARGEST
    again = command(*bench[:3], "elsewhere", *bench[4:])
    assert "6 of 6 runs are kept" in again
    assert not (tmp_path / "elsewhere").exists()  # nothing was played

    command("board", "--results", results, "--out", out, "--suites", suite)
    text = out.read_text()
    assert "llm-duel board --results" in text.splitlines()[2]
    assert "### Fewer than 10 seeds" in text
    assert "| rdo* |" in text
    assert "Not measured yet" not in text

    command("leaderboard", results, results / "tiny")  # the same results twice are counted once

    other = tmp_path / "other.yaml"  # has some of the runs, under labels of its own, and one that nobody played
    agents = {"mine": {"agent": "online_dpo"}, "uniform": {}, "offline_dpo": {}}
    other.write_text(yaml.safe_dump({"name": "other", "entries": [TINY["entries"][0] | {"agents": agents}]}))
    with pytest.raises(SystemExit) as end:
        cli.main(["leaderboard", str(results), "--suite", str(other), "--out", str(tmp_path / "of-suite")])
    assert end.value.code == 0
    assert "2 of 6 runs are not among the results" in capsys.readouterr().err
    with (tmp_path / "of-suite/leaderboard.csv").open(newline="") as file:
        assert sorted(row["label"] for row in csv.DictReader(file)) == ["mine", "uniform"]
    assert f"--suite {other}" in (tmp_path / "of-suite/leaderboard.html").read_text()
    assert cli.carry_out(cli.Leaderboard((results,), suite="quick")) == 2
    assert "suite quick: expected results of some of its 40 runs, got none" in capsys.readouterr().err

    (results / "tiny/uniform/seed-1/result.json").unlink()
    command("board", "--results", results, "--out", out, "--suites", suite)
    assert "Not measured yet (runs): `uniform` (1)." in out.read_text()


def result(agent, seed, wins, needs=(), provenance="paper", **changes):
    """A result as a run leaves it, of the default settings of `RunConfig`."""
    return {
        "agent": agent, "label": agent, "provenance": provenance, "needs": list(needs), "env": "duel/Synthetic-v0",
        "kind": "finite", "env_kwargs": {}, "feedback": "bernoulli", "overrides": {}, "seed": seed, "budget": 1000,
        "batch": 32, "eval_prompts": 512, "status": "finished", "online_win_rate": 0.5, "cumulative_regret": 1.0,
        "gradient_steps": 3, "generated_tokens": None, "seconds": 1.0, "fingerprint": "now", "evaluations": 0,
        "curve": {"queries": [0, 500, 1000], "offline_win_rate": [0.5, (0.5 + wins) / 2, wins]},
    } | changes  # fmt: skip


def made(tmp_path, results, agents):
    for number, one in enumerate(results):
        path = tmp_path / str(number) / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(one))
    kept = stored.Kept(tmp_path, lambda env, env_kwargs: stored.TaskFacts("now", 512))
    runs = [RunConfig(a, "duel/Synthetic-v0", "runs", seed=s, label=a) for a in agents for s in range(10)]
    return board.part("x", kept, runs)


def test_sections_and_ranks(tmp_path):
    results = [result("online_dpo", s, 0.8 + s / 1000) for s in range(10)]
    results += [result("sea", s, 0.9 + s / 1000) for s in range(10)]
    results += [result("apl", s, 0.95, provenance="reconstructed") for s in range(10)]
    results += [result("rdo", s, 0.97, needs=["scores"], provenance="reconstructed") for s in range(10)]
    results += [result("real", 0, 0.99)]
    part = made(tmp_path, results, ["sea", "online_dpo", "apl", "rdo", "real", "xpo"])
    duels, richer, few = part.sections()
    assert [(row.label, row.rank and row.rank.estimate) for row in duels] == [
        ("apl", None),
        ("sea", 1),
        ("online_dpo", 2),
    ]
    assert [row.label for row in richer] == ["rdo"]
    assert [row.label for row in few] == ["real"]
    assert part.missing == {"real": 9, "xpo": 10}
    assert all(row.queries_to_target is not None for row in duels + richer + few)  # one target for all
    assert [row.label for row in part.rows("rdo")] == ["rdo"]
    text = board.board([part], "make board")
    assert text.index("| apl* |") < text.index("| rdo* |") < text.index("| real* |")

    # With seeds enough for all, the one table of all has ranks; an agent that is told more keeps none of them.
    results = [one for one in results if one["agent"] != "real"]
    results += [result("sb3_dqn", s, 0.98 + s / 1000, needs=["reward"]) for s in range(10)]
    part = made(tmp_path / "all", results, ["sea", "online_dpo", "apl", "rdo", "sb3_dqn"])
    assert [row.place for row in part.table.rows if row.label == "sb3_dqn"] == [1]
    duels, richer, _ = part.sections()
    assert [(row.label, row.rank, row.place, row.tied) for row in richer] == [
        ("sb3_dqn", None, None, ()),
        ("rdo", None, None, ()),
    ]
    assert [row.place for row in duels] == [None, 1, 2]


def test_stalled_runs_of_every_section_are_named_and_what_bought_nothing_has_no_regret(tmp_path):
    results = [result("online_dpo", s, 0.8 + s / 1000) for s in range(10)]
    for s in range(10):
        curve = {"queries": [0, 500, 600 + 10 * s], "offline_win_rate": [0.5, 0.6, 0.7]}
        results.append(result("selm", s, 0.7, status="stalled" if s < 6 else "finished", curve=curve))
    nothing = {"queries": [0, 0], "offline_win_rate": [0.5, 0.7], "kl": [0.0, 9.0], "cumulative_regret": [0.0, 0.0]}
    free = {"status": "stalled", "curve": nothing, "online_win_rate": None, "cumulative_regret": 0.0}
    results += [result("dlma", s, 0.7, ["contrast_prompts"], "reconstructed", **free) for s in range(10)]
    results += [result("vpo", 0, 0.7, provenance="reconstructed", **free)]
    part = made(tmp_path, results, ["online_dpo", "selm", "dlma", "vpo"])
    rows = {row.label: row for row in part.table.rows}
    assert (rows["selm"].queries, rows["selm"].stalled, rows["selm"].cumulative_regret) == (645.0, 6, 1.0)
    assert (rows["dlma"].queries, rows["dlma"].cumulative_regret) == (0.0, None)
    assert "cumulative regret" in rows["selm"].differences
    assert "cumulative regret" not in rows["dlma"].differences
    assert matched(part.table).levels == ()
    text = board.board([part], "make board")
    (stalled,) = (line for line in text.splitlines() if "(stalled)" in line)
    assert "selm (6 of 10 seeds; 645 queries bought, the mean of all seeds)" in stalled
    assert "dlma (10 of 10 seeds; 0 queries bought" in stalled
    assert "vpo (1 of 1 seeds; 0 queries bought" in stalled
    page = "\n".join(pages.measured("selm", [part]))
    assert "| 1000 | 645 |" in page
    assert "| 10 (6 stalled) |" in page
    page = "\n".join(pages.measured("dlma", [part]))
    assert "| 1000 | 0 |" in page
    assert "0.0 |" not in page  # no regret of 0


def test_claimed_queries_have_a_column_and_the_agent_of_today_says_what_it_rests_on(tmp_path):
    results = [result("online_dpo", s, 0.8 + s / 1000) for s in range(10)]
    results += [result("sea", s, 0.85 + s / 1000) for s in range(10)]
    for s in range(10):
        played = result("sea_as_released", s, 0.9)  # when this was said to be the paper's
        played["curve"]["claimed_queries"] = [0, 400, 760 + s]
        results.append(played)
    part = made(tmp_path, results, ["online_dpo", "sea", "sea_as_released"])
    assert [(row.label, row.place) for row in part.sections()[0]] == [
        ("sea_as_released", None),
        ("sea", 1),
        ("online_dpo", 2),
    ]
    text = board.board([part], "make board").splitlines()
    (headings,) = (line.split(" | ") for line in text if line.startswith("| agent |") and "rank" in line)
    (released,) = (line.split(" | ") for line in text if line.startswith("| sea_as_released* | 0.900 "))
    (sea,) = (line.split(" | ") for line in text if line.startswith("| sea | 0.85"))
    column = [heading.strip(" |") for heading in headings].index("claimed queries")
    assert (released[column].strip(" |"), sea[column].strip(" |")) == ("764", "–")  # the mean of 760 to 769
    assert any(line.startswith("Claimed queries:") for line in text)


def test_a_suite_on_several_tasks_and_budgets_has_a_part_for_each(tmp_path):
    tuned = recipe_of("duel/Synthetic-v0", "online_dpo")
    results = [result("online_dpo", s, 0.8 + s / 1000, overrides=tuned) for s in range(10)]
    for number, one in enumerate(results):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "result.json").write_text(json.dumps(one))
    kept = stored.Kept(tmp_path, lambda env, env_kwargs: stored.TaskFacts("now", 512))
    found = board.parts_of("paper-real", kept)
    assert len(found) == 2 * 6 + 1  # six correlations at two budgets, and the pool
    (played,) = [part for part in found if part.table is not None]
    assert [row.label for row in played.table.rows] == ["online_dpo"]
    assert set(played.missing) == {"real", "real-random", "real-similar", "real-centroid"}
    text = board.board(found, "make board")
    assert text.count("Not measured yet (runs)") == 13


def test_results_of_other_settings_are_marked_and_of_another_task_are_not_taken(tmp_path):
    results = [result("sea", s, 0.9, overrides={"beta": 0.5}) for s in range(10)]
    results += [result("online_dpo", s, 0.8, fingerprint="then") for s in range(10)]
    results += [result("xpo", s, 0.8, eval_prompts=256) for s in range(10)]
    part = made(tmp_path, results, ["sea", "online_dpo", "xpo"])
    assert [row.label for row in part.table.rows] == ["sea" + board.MARK]
    assert part.missing == {"online_dpo": 10, "xpo": 10}


def test_settings_written_as_text_or_number_are_the_same():
    run = RunConfig("sea", "duel/Synthetic-v0", "runs", overrides={"policy.learning_rate": "1e-4", "loss": "dpo"})
    assert stored.same_settings({"overrides": {"policy.learning_rate": 0.0001, "loss": "dpo"}}, run)
    assert not stored.same_settings({"overrides": {"policy.learning_rate": 0.0002, "loss": "dpo"}}, run)


def test_a_large_result_is_thinned_and_keeps_its_end():
    points = list(range(2001))
    large = {"label": "sea", "curve": {"queries": points, "offline_win_rate": [0.123] * len(points)}}
    small = stored.fitted(large)
    assert len(json.dumps(small)) < stored.LARGEST
    assert small["curve"]["queries"][-1] == 2000
    assert len(small["curve"]["queries"]) == len(small["curve"]["offline_win_rate"]) > 100
    with pytest.raises(ValueError, match="does not fit"):
        stored.fitted({"label": "x" * 20_000, "curve": {"queries": [0]}})


def test_copies_of_one_result_are_one_and_other_results_are_refused():
    one = result("sea", 0, 0.9)
    assert tables([one, dict(one)])[0].rows[0].seeds == 1
    with pytest.raises(ValueError, match="there twice"):
        tables([one, result("sea", 0, 0.8)])
