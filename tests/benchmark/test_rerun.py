"""Rounds are played again from seed and settings: what matches, where it parts, and what nobody can replay."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
from benchmark_helpers import config, sea, silent

from llm_duel_env import cli
from llm_duel_env.benchmark import leaderboard
from llm_duel_env.benchmark.report import table
from llm_duel_env.benchmark.rerun import CannotReplay, replay, rerun
from llm_duel_env.benchmark.results import SELF_REPORTED, checked, find_results
from llm_duel_env.benchmark.runner import run
from llm_duel_env.benchmark.submission import pack
from llm_duel_env.options import Leaderboard


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        run(sea(folder / "sea" / f"seed-{seed}", seed=seed), say=silent)
    run(config(folder / "dpo", seed=0, budget=200), say=silent)
    return folder


def result_of(folder):
    return find_results([folder])[0][0]


def test_on_the_same_machine_every_round_is_identical(runs):
    seen = replay(result_of(runs / "sea" / "seed-1"), rounds=10_000)  # to the end
    result = json.loads((runs / "sea" / "seed-1" / "result.json").read_text())
    assert seen.equal
    assert (seen.rounds, seen.rounds_equal) == (result["rounds"], result["rounds"])
    assert (seen.labels, seen.labels_equal) == (200, 200)
    assert seen.evaluations == seen.evaluations_equal == len(result["curve"]["queries"])
    assert str(seen).endswith("the same")


def test_an_archive_is_replayed_and_its_entries_are_marked(runs, tmp_path, capsys):
    pack([runs / "sea"], tmp_path / "a.zip", by="A. Person", description="x")
    report = tmp_path / "report"
    assert cli.carry_out(Leaderboard((tmp_path / "a.zip",), report, rerun=(6,))) == 0
    assert "6 of 6 rounds" in capsys.readouterr().out
    told = json.loads((report / "leaderboard.json").read_text())
    assert told[0]["rows"][0]["checked"].startswith("replayed: 6 rounds, ")
    assert told[0]["rows"][0]["checked"].endswith(", 1 of 2 seeds")
    assert cli.carry_out(Leaderboard((tmp_path / "a.zip",), rerun=(6, 7))) == 2
    assert cli.carry_out(Leaderboard((tmp_path / "a.zip",), rerun=(0,))) == 2


def changed(runs, tmp_path, number, **changes):
    """A copy of a run, one record of whose ledger is another, with a result that knows the ledger's hash."""
    copy = Path(shutil.copytree(runs / "dpo", tmp_path / "copy"))
    lines = [json.loads(line) for line in (copy / "ledger.jsonl").read_text().splitlines()]
    lines[1 + number].update(changes)
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (copy / "ledger.jsonl").write_bytes(content)
    result = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_text(json.dumps({**result, "ledger_sha256": sha256(content).hexdigest()}))
    return result_of(copy), json.loads((runs / "dpo" / "ledger.jsonl").read_text().splitlines()[1 + number])


def test_a_made_up_label_is_found_and_told(runs, tmp_path):
    result, honest = changed(runs, tmp_path, 5, label=0.5)
    said = []
    (seen,) = rerun([result], 4, say=said.append)
    number = honest["round"] + 1
    assert seen["replay"]["difference"] == f"round {number}, query 5: label was 0.5, here {honest['label']}"
    assert seen["replay"]["rounds_equal"] == seen["replay"]["rounds"] - 1 == 3
    assert f"first difference: round {number}, query 5" in said[0]
    assert checked([seen]).startswith("differs: 3 of 4 rounds equal")


def test_another_seed_is_another_run(runs):
    other = {**result_of(runs / "dpo"), "seed": 1}
    seen = replay(other, 3)
    assert seen.rounds_equal == 0
    assert "round 1, query 0: prompt_id was" in seen.difference
    raised = json.loads(json.dumps(result_of(runs / "dpo")))
    raised["curve"]["offline_win_rate"] = [min(v + 0.1, 1) for v in raised["curve"]["offline_win_rate"]]
    assert "evaluation after 0 queries: offline_win_rate was" in replay(raised, 3).difference


def test_a_result_that_is_kept_without_its_ledger_is_compared_by_its_curve(runs, tmp_path):
    (tmp_path / "kept").mkdir()
    shutil.copy(runs / "dpo" / "result.json", tmp_path / "kept")
    seen = replay(result_of(tmp_path / "kept"), 8)
    assert seen.equal
    assert (seen.rounds, seen.labels) == (0, 0)
    assert seen.evaluations >= 2
    with pytest.raises(CannotReplay, match="not evaluated in its first 1 rounds"):
        replay(result_of(tmp_path / "kept"), 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"length_controlled_win_rate": 0.99}, "length_controlled_win_rate was 0.99, here None (1 differ"),
        ({"gradient_steps": 1}, "gradient_steps was 1, here "),
        ({"evaluations": 7, "labels": {}}, "evaluations was 7, here 0 (2 differ: evaluations, labels)"),
        (
            {"beliefs": {"queries": [0], "believed": [0.9]}},
            "beliefs was {'queries': [0], 'believed': [0.9]}, here None",
        ),
        ({"online_win_rate": 0.99, "cumulative_regret": 0.0}, "online_win_rate was 0.99, here "),
        ({"eval_prompts": 512}, "eval_prompts was 512, here 24"),
        ({"status": "stalled"}, "status was stalled, here finished"),
    ],
)
def test_figures_beside_the_curve_are_compared_at_the_end(runs, changes, said):
    raised = {**result_of(runs / "dpo"), **changes}
    assert replay(raised, 3).equal  # nothing is known of them before the end
    seen = replay(raised, 10_000)
    assert said in seen.difference
    assert seen.difference.startswith("at the end: ")
    assert not seen.equal
    assert checked([{**raised, "replay": seen.as_found()}]).startswith("differs: ")


def test_beliefs_are_examined_where_the_run_did_though_its_kept_curve_is_thinner(runs):
    result = result_of(runs / "sea" / "seed-0")
    curve = {name: [values[0], values[-1]] for name, values in result["curve"].items()}
    assert len(result["beliefs"]["queries"]) > 2
    seen = replay({**result, "curve": curve}, 10_000)
    assert (seen.equal, seen.evaluations) == (True, 2)
    lower = {**result["beliefs"], "believed": [0.5] * len(result["beliefs"]["queries"])}
    assert "at the end: beliefs was" in replay({**result, "curve": curve, "beliefs": lower}, 10_000).difference


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"agent": "nobodys_agent"}, "agent nobodys_agent is not installed"),
        ({"agent": "/tmp/evil.py:Agent", "archive": "a.zip"}, "is a file of its author's"),
        ({"env": "duel/Elsewhere-v0"}, "no environment is called"),
        ({"overrides": {"colour": 1}}, "no field 'colour'"),
        ({"env_kwargs": {"task": "text"}, "archive": "a.zip"}, "names models and data of its author's"),
        ({"overrides": {"policy.encoder": "evil/model"}, "archive": "a.zip"}, "policy.encoder names a file or a model"),
        ({"needs": [], "provenance": "ours"}, "says .* of itself"),
        ({"fingerprint": "0" * 64}, "made of other weights or data"),
        ({"ledger_sha256": "0" * 64}, "its ledger is not the one"),
    ],
)
def test_what_cannot_be_replayed_says_why(runs, changes, said):
    result = {**result_of(runs / "dpo"), **changes}
    with pytest.raises(CannotReplay, match=said):
        replay(result, 2)
    lines = []
    assert checked(rerun([result], 2, say=lines.append)) == SELF_REPORTED
    assert "cannot be replayed: " in lines[0]


def test_tables_tell_the_replayed_from_the_self_reported(runs):
    results = find_results([runs])[0]
    assert any("All entries are self-reported" in note for note in table.notes(leaderboard.tables(results)[0]))
    assert "checked" not in table.cells(leaderboard.tables(results)[0])[0]
    seen = rerun([r for r in results if r["label"] == "sea"], 2, seeds=0, say=silent)
    (found,) = leaderboard.tables([*seen, *(r for r in results if r["label"] != "sea")])
    headings, rows = table.cells(found)
    told = {row[0]: row[headings.index("checked")] for row in rows}
    assert told["online_dpo"] == "self-reported"
    assert told["sea"].startswith("replayed: 4 rounds, ")
    assert told["sea"].endswith(", 2 of 2 seeds")
    assert any(note.startswith("Checked: ") for note in table.notes(found))
