"""`llm-duel bench`: parts of suites, pools that are not there, what is over; and what a run tells of its labels."""

import json

import numpy as np
import pytest
import yaml
from benchmark_helpers import WORLD, config, silent

from llm_duel_env import cli
from llm_duel_env.benchmark import bench_command, stored, suite
from llm_duel_env.benchmark.labels import label_counts
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.runner import run
from llm_duel_env.tasks.synthetic import Synthetic

SMALL = {
    "agents": ["uniform", "online_dpo"],
    "seeds": 2,
    "budget": 24,
    "batch": 8,
    "eval_every": 0.5,
    "eval_prompts": 24,
}
MIXED = {
    "name": "mixed",
    "entries": [
        {"env": "duel/Synthetic-v0", "env_kwargs": WORLD, **SMALL},
        {"env": "duel/Synthetic-v0", "env_kwargs": {**WORLD, "flip_rate": 0.3}, **SMALL},
        {"env": "duel/Pool-v0", **SMALL},
    ],
}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Plays `llm-duel bench` on a suite; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("LLM_DUEL_POOL", raising=False)

    def call(content, *arguments):
        (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(SystemExit) as end:
            cli.main(["bench", "mixed.yaml", "--out", "runs", "--jobs", "1", *map(str, arguments)])
        told = capsys.readouterr()
        return end.value.code, told.out, told.err

    return call


def rows(table):
    """Of a printed table the cells of each row, by task and label."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    return {(task, label): [*map(int, numbers), hours] for task, label, *numbers, hours in cells}


def test_a_dry_run_counts_a_part_is_played_and_kept_apart_by_task(command, tmp_path):
    code, out, err = command(MIXED, "--dry-run")
    assert code == 0
    assert "LEFT OUT: 4 of 12 runs play on a pool" in err
    assert "llm-duel pool build" in err
    assert not (tmp_path / "runs").exists()
    found = rows(out)
    assert found.pop(("all", "")) == [8, 0, 0, 8, 8 * 24, "–"]
    assert list(found.values()) == [[2, 0, 0, 2, 48, "–"]] * 4

    code, out, _ = command(MIXED, "--results", "kept", "--only", "*flip*/uniform")
    assert code == 0
    assert "2 results kept in kept/mixed" in out
    kept = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "kept").rglob("result.json"))
    (folder,) = {path.rsplit("/", 3)[0] for path in kept}
    assert folder.startswith("kept/mixed/Synthetic-v0-flip_rate-0.3")

    found = rows(command(MIXED, "--results", "kept", "--dry-run")[1])
    assert found["all", ""] == [8, 0, 2, 6, 6 * 24, ">0.00"]  # nothing is known of online DPO's pace
    assert [numbers[-1] for (_, label), numbers in found.items() if label == "uniform"] == ["0.00", "0.00"]
    found = rows(command(MIXED, "--dry-run", "--only", "uniform")[1])  # the runs' own folders
    assert found["all", ""] == [4, 2, 0, 2, 2 * 24, ">0.00"]
    code, _, err = command(MIXED, "--only", "sea")
    assert code == 2
    assert "no run is named by 'sea'" in err


def test_a_suite_on_pools_alone_is_refused_without_one(command, tmp_path):
    code, _, err = command({"name": "pools", "entries": MIXED["entries"][2:]})
    assert code == 2
    assert "all 4 runs play on a pool, and there is none; make a pool with `llm-duel pool build" in err
    code, _, err = command(MIXED, "--pool", tmp_path / "nowhere")
    assert code == 2
    assert "expected a folder with a pool" in err


def test_a_pool_is_named_by_option_or_variable(tmp_path, monkeypatch):
    runs = suite.expand(MIXED, "out")
    told = RunConfig("sea", "duel/Pool-v0", "out", env_kwargs={"task_kwargs": {"folder": "mine"}})
    assert [bench_command.needs_pool(one) for one in [*runs[::4], told]] == [False, False, True, False]
    monkeypatch.setenv("LLM_DUEL_POOL", "somewhere")
    assert bench_command.playable(runs) == runs
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "pool.json").write_text("{}")
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(MIXED))
    bench = cli.Bench(str(tmp_path / "mixed.yaml"), pool=tmp_path / "pool", only=("pool/*",))
    chosen, whole = bench_command.selected(bench, tmp_path / "out")
    assert bench_command.os.environ["LLM_DUEL_POOL"] == str(tmp_path / "pool")
    assert (len(chosen), len(whole)) == (4, 12)
    assert not any("pool" in json.dumps(one.env_kwargs) for one in chosen)


def test_a_kept_result_counts_under_another_label_and_without_the_pool(tmp_path, monkeypatch):
    def result(label, **changes):
        told = {"agent": "sea", "label": label, "env": "duel/Pool-v0", "env_kwargs": POOLED, "seed": 6, "budget": 9,
                "batch": 32, "eval_prompts": 111, "fingerprint": "then", "overrides": {}, "curve": {}}  # fmt: skip
        (tmp_path / label).mkdir()
        (tmp_path / label / "result.json").write_text(json.dumps(told | changes))

    POOLED = {"task_kwargs": {"fold": "by_seed"}}
    result("sea")
    result("sea-other", overrides={"beta": 0.5})
    run_of = RunConfig("sea", "duel/Pool-v0", "out", seed=6, budget=9, env_kwargs=POOLED, label="3-sea")
    monkeypatch.delenv("LLM_DUEL_POOL", raising=False)
    assert stored.Kept(tmp_path).result(run_of)["label"] == "3-sea"  # nobody can tell whether the pool is another
    asked = []

    def facts(env, env_kwargs):
        asked.append(env_kwargs)
        return stored.TaskFacts("now", 111)

    assert stored.Kept(tmp_path, facts).result(run_of) is None
    assert asked == [{"task_kwargs": {"fold": 1}}]


def test_labels_are_counted_against_what_the_oracle_finds():
    draw = np.random.default_rng(0)
    preference = draw.choice([0.0, 0.5, 1.0, np.nan], 400)
    probability = draw.choice([0.0, 0.3, 0.5, 0.5 + 1e-7, 0.8], 400)
    charged = draw.random(400) < 0.7
    found = label_counts({"charged": charged, "preference": preference, "metrics/probability": probability})
    wanted = dict.fromkeys(found, 0)
    for label, p, paid in zip(preference, probability, charged):
        if not paid:
            wanted["identical"] += label == 0.5
            continue
        wanted["even"] += abs(p - 0.5) < 1e-6
        wanted["tied"] += label == 0.5
        wanted["flipped"] += abs(p - 0.5) >= 1e-6 and ((p > 0.5 and label == 0) or (p < 0.5 and label == 1))
    assert found == wanted
    assert min(wanted.values()) > 10


def test_a_result_tells_flips_and_ties_of_the_ledger(tmp_path):
    noisy = {**WORLD, "feedback": "threshold", "flip_rate": 0.3}
    result = run(config(tmp_path / "run", agent="uniform", overrides={}, env_kwargs=noisy), say=silent)
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()[1:]]
    flipped = sum(line["label"] != (line["probability"] > 0.5) for line in lines)
    assert result["labels"]["flipped"] == flipped > 10
    assert result["labels"]["tied"] == result["labels"]["even"] == 0
    assert result["labels"]["identical"] > 0  # uniform draws with six candidates
    del noisy["flip_rate"]
    clean = run(config(tmp_path / "clean", agent="uniform", overrides={}, env_kwargs=noisy), say=silent)
    assert clean["labels"]["flipped"] == 0


def test_an_intransitive_oracle_is_played_with_regret_and_without_utility(tmp_path):
    world = {"task_kwargs": {**WORLD["task_kwargs"], "preferences": "intransitive"}}
    result = run(config(tmp_path / "run", env_kwargs=world), say=silent)
    assert result["cumulative_regret"] > 0
    assert "true_utility" not in result["curve"]
    assert len(result["curve"]["offline_win_rate"]) == len(result["curve"]["queries"])
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in metrics if line["kind"] == "round"]
    assert all(line["utility_regret"] is None and line["regret"] >= -1e-6 for line in rounds)
    # The winner of a round is the von Neumann winner's mixture, by the task's own matrices.
    task = Synthetic(**world["task_kwargs"])
    ids = np.arange(4)
    lost = task.oracle.optimal_win_probability(task.observe(ids), np.zeros(4, int))
    assert (lost >= 0.5 - 1e-7).all()


def test_a_damaged_result_is_told_and_not_kept(command, tmp_path):
    """The others are played and kept."""
    told = {"name": "mixed", "entries": [{**MIXED["entries"][0], "agents": ["uniform"], "seeds": 3}]}
    assert command(told)[0] == 0
    first, second, _ = sorted((tmp_path / "runs").rglob("result.json"))
    first.write_text("[]")
    second.write_text("no JSON")
    code, out, err = command(told, "--results", "kept")
    assert code == 1
    assert f"broken: {first.parent.relative_to(tmp_path)}: " in err
    assert "expected the result of a run, got '[]'" in err
    assert "result.json is not JSON" in err
    assert "1 results kept in kept/mixed" in out
