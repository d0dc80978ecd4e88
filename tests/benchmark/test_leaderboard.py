"""The leaderboard from results made by hand: every figure can be checked on paper."""

import csv
import io
import json

import numpy as np
import pytest
from rich.console import Console

from llm_duel_env import cli
from llm_duel_env.benchmark import leaderboard
from llm_duel_env.benchmark.matched import matched
from llm_duel_env.benchmark.report import details, figures, plots, records, table
from llm_duel_env.benchmark.results import find_results

QUERIES = [0, 25, 50, 75, 100]


def result(agent, seed, wins, **changes):
    curve = {"queries": QUERIES, "offline_win_rate": wins, "true_utility": [w - 0.5 for w in wins]}
    curve |= {"win_low": [w - 0.02 for w in wins], "win_high": [w + 0.02 for w in wins], "kl": [0.1] * 5}
    curve |= {"cumulative_regret": [0.0, 1.0, 2.0, 3.0, 4.0]}
    return {
        **{"agent": agent, "label": agent, "provenance": "paper", "needs": [], "env": "duel/Synthetic-v0"},
        **{"kind": "finite", "env_kwargs": {}, "feedback": "bernoulli", "overrides": {}, "seed": seed, "budget": 100},
        **{"status": "finished", "curve": curve, "online_win_rate": 0.6, "cumulative_regret": 4.0, "seconds": 2.0},
        **{"batch": 8, "eval_prompts": 24, "gradient_steps": 12},
        **changes,
    }


SLOW = [0.5, 0.6, 0.7, 0.9, 0.9]  # target 0.5 + 0.95 * 0.4 = 0.88, reached at 75
FAST = [0.5, 0.9, 0.9, 0.9, 0.92]  # reached at 25
NEVER = [0.5, 0.5, 0.6, 0.6, 0.9]


def test_rows_hold_what_the_curves_say():
    runs = [result("online_dpo", s, SLOW) for s in range(2)] + [result("sea", s, FAST) for s in range(2)]
    runs += [result("uniform", s, NEVER) for s in range(2)]
    (found,) = leaderboard.tables(runs)
    assert found.target == pytest.approx(0.88)
    assert [row.label for row in found.rows] == ["sea", "online_dpo", "uniform"]
    sea, dpo, uniform = found.rows
    assert (sea.queries_to_target, dpo.queries_to_target, uniform.queries_to_target) == (25.0, 75.0, 100.0)
    assert (sea.censored, uniform.censored) == (0, 2)
    assert sea.ratio.estimate == pytest.approx(1 / 3)
    assert (sea.ratio_bound, uniform.ratio_bound) == ("", ">")
    assert dpo.ratio is None
    assert sea.win_rate == pytest.approx(0.92)
    assert sea.gradient_steps == 12
    # Two seeds: too few for an interval over seeds or a rank.
    assert (sea.win_interval, sea.rank, sea.differences) == (None, None, {})


def test_ten_seeds_on_finite_tasks_give_intervals_and_ranks():
    draw = np.random.default_rng(0)
    runs = [result("online_dpo", s, [*SLOW[:4], 0.8 + 0.01 * float(draw.random())]) for s in range(10)]
    runs += [result("sea", s, FAST) for s in range(10)]
    runs += [result("guess", s, FAST, provenance="reconstructed") for s in range(10)]
    (found,) = leaderboard.tables(runs)
    rows = {row.label: row for row in found.rows}
    assert rows["sea"].interval_over == "seeds"
    assert (rows["sea"].rank.estimate, rows["online_dpo"].rank.estimate) == (1.0, 2.0)
    assert rows["guess"].rank is None  # rebuilt from notes: not ranked as the paper's
    assert rows["sea"].improvement == 1.0
    finals = sorted(run["curve"]["offline_win_rate"][-1] for run in runs[:10])
    assert rows["online_dpo"].iqm == pytest.approx(np.mean(finals[2:8]))
    assert rows["sea"].differences["offline win rate"].low > 0.1
    assert "guess*" in table.markdown([found])


def test_differences_are_paired_by_seed_and_told_with_their_intervals():
    runs = [result("online_dpo", s, [*SLOW[:4], 0.8 + 0.01 * s], cumulative_regret=50.0 + 10 * s) for s in range(10)]
    runs += [result("sea", s, FAST, cumulative_regret=40.0 + 10 * s, online_win_rate=None) for s in range(10)]
    (found,) = leaderboard.tables(runs)
    sea, dpo = found.rows
    regret = sea.differences["cumulative regret"]
    assert (regret.estimate, regret.low, regret.high) == (-10.0, -10.0, -10.0)  # alike in each pair, whatever the seed
    assert sea.differences["queries to target"].estimate == sea.queries_to_target - dpo.queries_to_target
    assert sea.differences["curve mean"].estimate == pytest.approx(sea.area - dpo.area)
    assert "online win rate" not in sea.differences  # that run does not know it
    assert dpo.differences == {}
    headings, (row,) = table.paired_cells(found)
    assert row[headings.index("cumulative regret")] == "-10 [-10, -10]"
    assert row[0] == "sea"
    assert "Less online_dpo, paired by seed" in table.markdown([found])
    told = next(csv.DictReader(io.StringIO(table.csv_text([found]))))
    assert float(told["difference_cumulative_regret_high"]) == -10.0
    assert told["difference_online_win_rate"] == ""


def test_what_is_paired_by_seed_needs_as_many_seeds_in_common():
    """Ten seeds each, one of them shared: nothing that is paired is told, and nobody is told apart."""
    runs = [result("online_dpo", s, SLOW) for s in range(10)] + [result("sea", s, FAST) for s in range(9, 19)]
    (found,) = leaderboard.tables(runs, against=["sea"])
    sea, dpo = found.rows
    assert (sea.differences, sea.improvement, sea.rank) == ({}, None, None)
    assert (sea.place, sea.tied, dpo.place, dpo.tied) == (1, ("online_dpo",), 1, ("sea",))
    assert sea.win_interval is not None  # that is over its own seeds
    assert sea.ratio.estimate == pytest.approx(1 / 3, abs=0.01)
    assert not sea.ratio.has_ends
    assert details.less(found, "sea").rows == []
    assert all(at.difference is None for at in matched(found).agents["sea"].values())
    told = next(csv.DictReader(io.StringIO(table.csv_text([found]))))
    assert (told["ratio_low"], told["ratio_high"]) == ("", "")
    headings, cells = table.cells(found)
    assert cells[0][headings.index("÷ online DPO")] == "0.33"


def test_an_agent_with_few_seeds_takes_no_rank_from_others(tmp_path):
    runs = [result("online_dpo", s, SLOW) for s in range(10)] + [result("sea", s, FAST) for s in range(10)]
    alone = {row.label: (row.place, row.rank) for row in leaderboard.tables(runs)[0].rows}
    (found,) = leaderboard.tables([*runs, result("stranger", 0, FAST)])
    ranks = {row.label: (row.place, row.rank) for row in found.rows}
    assert ranks == alone | {"stranger": (None, None)}
    assert found.few_seeds == ["stranger"]
    table.write([found], tmp_path)
    written = json.loads((tmp_path / "leaderboard.json").read_text(), parse_constant=pytest.fail)
    (stranger,) = [row for row in written[0]["rows"] if row["label"] == "stranger"]
    assert stranger["ratio"]["low"] is None


def test_other_tasks_and_other_evaluations_stand_in_tables_of_their_own():
    """Two pools, say, which settings do not name; an older result that does not tell stands with the rest."""
    told = {"fingerprint": "a" * 40, "eval_every": 0.02}
    runs = [result("online_dpo", 0, SLOW, **told), result("sea", 0, FAST), result("uniform", 0, NEVER, **told)]
    (found,) = leaderboard.tables(runs)
    assert (found.fingerprint, found.eval_every, len(found.rows)) == ("a" * 40, 0.02, 3)
    assert "task" not in found.title
    others = leaderboard.tables([*runs[::2], result("sea", 0, FAST, fingerprint="b" * 40, eval_every=0.02)])
    assert [(list(one.results), one.title.rsplit(", ", 1)[1]) for one in others] == [
        (["online_dpo", "uniform"], "task aaaaaaaaaaaa"),
        (["sea"], "task bbbbbbbbbbbb"),
    ]
    coarse = leaderboard.tables([*runs[::2], result("sea", 0, FAST, fingerprint="a" * 40, eval_every=0.5)])
    assert [one.title.rsplit(", ", 1)[1] for one in coarse] == [
        "evaluated every 0.02 of the budget",
        "evaluated every 0.5 of the budget",
    ]


def test_a_run_with_more_evaluations_crosses_no_earlier():
    """The same curve, seen at every tenth of the budget and at every fiftieth; rounds are a tenth of it long."""
    fine = np.linspace(0, 100, 51)
    wins = 0.5 + 0.4 * np.minimum(1, fine / 60)
    seen = {"queries": fine.tolist(), "offline_win_rate": wins.tolist()}
    rarely = {name: values[::5] for name, values in seen.items()}
    runs = [result("online_dpo", 0, SLOW, curve=rarely, batch=10), result("sea", 0, SLOW, curve=seen, batch=10)]
    (found,) = leaderboard.tables(runs)
    assert {row.queries_to_target for row in found.rows} == {60.0}  # 57 is where the line crosses, and no mark


def test_others_can_be_compared_with_any_label():
    runs = [result("online_dpo", s, [*SLOW[:4], 0.8 + 0.01 * s], cumulative_regret=50.0 + 10 * s) for s in range(10)]
    runs += [result("sea", s, FAST, cumulative_regret=40.0 + 10 * s) for s in range(10)]
    runs += [result("xpo", s, FAST) for s in range(4)]  # too few seeds to be compared
    (found,) = leaderboard.tables(runs, against=["sea"])
    block = details.less(found, "sea")
    (row,) = block.rows
    assert row[0] == "online_dpo"
    assert row[block.headings.index("cumulative regret")] == "+10 [+10, +10]"
    ours = next(one for one in found.rows if one.label == "sea").differences["offline win rate"]
    mirrored = f"{-ours.estimate:+.3f} [{-ours.high:+.3f}, {-ours.low:+.3f}]"
    assert row[block.headings.index("offline win rate")] == mirrored
    assert "Less sea, paired by seed" in table.markdown([found])
    assert "Less sea" not in table.markdown(leaderboard.tables(runs))
    with pytest.raises(ValueError, match=r"against: expected one of \['online_dpo', 'sea', 'xpo'\], got 'see'"):
        leaderboard.tables(runs, against=["see"])


def test_ranks_that_are_not_told_apart_are_ties():
    """Both end alike but for noise that changes its sign from seed to seed; the third ends lower in every seed."""
    runs = [result("online_dpo", s, [*SLOW[:4], 0.9]) for s in range(10)]
    runs += [result("sea", s, [*SLOW[:4], 0.9 + (0.02 if s % 2 else -0.018)]) for s in range(10)]
    runs += [result("uniform", s, [*SLOW[:4], 0.7]) for s in range(10)]
    (found,) = leaderboard.tables(runs)
    rows = {row.label: row for row in found.rows}
    assert {label: (row.place, row.tied) for label, row in rows.items()} == {
        "sea": (1, ("online_dpo",)),
        "online_dpo": (1, ("sea",)),
        "uniform": (3, ()),
    }
    assert rows["sea"].rank.estimate == 1.0  # by its mean alone it would be the first
    headings, cells = table.cells(found)
    assert [row[headings.index("rank")] for row in cells] == ["1= [1, 2]", "1= [1, 2]", "3 [3, 3]"]
    assert any("'=': there are others" in note for note in table.notes(found))
    told = list(csv.DictReader(io.StringIO(table.csv_text([found]))))
    assert [(row["place"], row["tied"]) for row in told] == [("1", "online_dpo"), ("1", "sea"), ("3", "")]


BELIEVED = {"queries": [0, 50, 100], "believed": [0.5, 0.8, 0.97], "labelled": [0.5, 0.8, 0.9], "accuracy": [0.5] * 3}


def test_figures_that_only_newer_results_have():
    newer = {"kind": "text", "length_controlled_win_rate": 0.81, "beliefs": BELIEVED}
    runs = [result("sea", s, FAST, **newer) for s in range(5)] + [
        result("online_dpo", s, SLOW, kind="text") for s in range(5)
    ]
    for told in runs[:5]:
        told["curve"] |= {"simple_regret": [1.0, 0.5, 0.4, 0.3, 0.2], "true_win_rate": [0.5, 0.6, 0.7, 0.8, 0.7]}
    (found,) = leaderboard.tables(runs)
    sea, dpo = found.rows
    assert (sea.simple_regret, sea.length_controlled, sea.true_win_rate) == pytest.approx((0.2, 0.81, 0.7))
    assert sea.beliefs == pytest.approx({"believed": 0.97, "labelled": 0.9, "accuracy": 0.5})
    assert (dpo.simple_regret, dpo.length_controlled, dpo.true_win_rate, dpo.beliefs) == (None, None, None, {})
    headings, (first, second) = table.cells(found)
    assert {"length-controlled", "true win rate", "simple regret"} <= set(headings)
    assert (first[headings.index("length-controlled")], second[headings.index("length-controlled")]) == ("0.810", "–")
    (block,) = [block for block in details.blocks(found) if block.title == "What reward models believe"]
    assert block.rows == [["sea", "0.970", "0.900", "0.500"]]
    (told, other) = records.records([found])
    assert (told["belief_believed"], other["belief_believed"], told["belief_spread"]) == (0.97, None, None)


def test_all_rows_as_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    runs = [result("online_dpo", s, SLOW) for s in range(10)] + [result("sea", s, FAST) for s in range(10)]
    made = leaderboard.tables([*runs, result("sea", 0, FAST, budget=200, beliefs=BELIEVED)])
    path = records.write_parquet(made, tmp_path / "rows.parquet")
    assert pyarrow.read_table(path).to_pylist() == records.records(made)


def test_parquet_is_asked_for_before_anything_is_read(tmp_path, monkeypatch, capsys):
    assert cli.carry_out(cli.Leaderboard((tmp_path / "no",), parquet=True)) == 2
    assert "--parquet: expected --out" in capsys.readouterr().err

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("llm_duel_env.extras.importlib.import_module", absent)
    assert cli.carry_out(cli.Leaderboard((tmp_path / "no",), tmp_path / "out", parquet=True)) == 2
    assert "pip install 'llm-duel-env[parquet]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_curves_over_queries_as_csv():
    runs = [result("online_dpo", s, [*SLOW[:4], 0.8 + 0.01 * s]) for s in range(10)] + [result("sea", 0, FAST)]
    lines = list(csv.DictReader(io.StringIO(records.curves_csv(leaderboard.tables(runs)))))
    last = {line["label"]: line for line in lines if float(line["queries"]) == 100}
    assert float(last["online_dpo"]["mean"]) == pytest.approx(0.845)
    assert float(last["online_dpo"]["iqm"]) == pytest.approx(0.845)
    assert float(last["online_dpo"]["mean_low"]) < 0.845 < float(last["online_dpo"]["mean_high"])
    assert (last["sea"]["mean"], last["sea"]["mean_low"]) == ("0.92", "")  # one seed: no band over seeds
    assert len(lines) == 2 * 51


def test_profiles_kl_and_overoptimisation_are_drawn(tmp_path):
    runs = [result("online_dpo", s, SLOW) for s in range(10)]
    assert [path.name for path in figures.write(leaderboard.tables(runs[:1]), tmp_path / "one")] == [
        "profiles.png",
        "win_rate_by_kl.png",
    ]
    runs += [result("sea", s, FAST, beliefs=BELIEVED) for s in range(10)]
    for told in runs:
        told["curve"] |= {"kl": [0.0, 0.3, 0.6, 0.8, 1.2], "true_win_rate": [0.5, 0.5, 0.6, 0.7, 0.6]}
    drawn = figures.write(leaderboard.tables(runs), tmp_path / "all")
    assert {path.name for path in drawn} >= {"overoptimisation_oracle.png", "overoptimisation_belief.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_an_overoptimisation_path_goes_through_what_was_measured():
    runs = [result("online_dpo", 0, SLOW), result("sea", 0, FAST, beliefs=BELIEVED)]
    (one,) = leaderboard.tables(runs)
    drawn, (panel,) = plots.panels_for(1, 4.0, 4.0)
    figures.overoptimisation_panel(panel, one, figures.PAIRS[1])
    path = panel.lines[0].get_xydata()
    assert path == pytest.approx(np.array([BELIEVED["believed"], BELIEVED["labelled"]]).T)
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["sea"]
    assert drawn is panel.figure


def test_one_seed_gets_the_interval_over_prompts_and_says_so():
    (found,) = leaderboard.tables([result("online_dpo", 0, SLOW), result("sea", 0, FAST)])
    assert found.rows[0].win_interval == pytest.approx((0.90, 0.94))
    assert any("over held-out prompts, not over seeds" in note for note in table.notes(found))
    assert any("no rank: sea, online_dpo" in note for note in table.notes(found))
    (text,) = leaderboard.tables([result("online_dpo", 0, SLOW, kind="text")])
    assert any("KL and tokens are of samples of the policy at temperature 1" in note for note in table.notes(text))
    headings, (cells,) = table.cells(text)
    assert cells[headings.index("gradient steps")] == "12"


def test_budgets_settings_and_richer_feedback_are_kept_apart():
    runs = [result("sea", 0, FAST), result("sea", 0, FAST, budget=200)]
    runs += [result("sea", 0, FAST, env_kwargs={"flip_rate": 0.1}), result("xpo", 0, FAST, needs=["scores"])]
    runs += [result("sea", 0, FAST, batch=16), result("sea", 0, FAST, eval_prompts=12)]
    assert len(leaderboard.tables(runs)) == 6
    with pytest.raises(ValueError, match="twice"):
        leaderboard.tables([result("sea", 0, FAST, folder="a"), result("sea", 0, SLOW, folder="b")])


def test_runs_without_a_win_rate_are_left_out(tmp_path, capsys):
    blind = result("sea", 0, FAST)
    del blind["curve"]["offline_win_rate"]
    (found,) = leaderboard.tables([result("online_dpo", 0, SLOW), blind])
    assert [row.label for row in found.rows] == ["online_dpo"]
    for number, told in enumerate([result("online_dpo", 0, SLOW), blind]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(told))
    assert cli.carry_out(cli.Leaderboard((tmp_path,))) == 0
    assert f"1 runs know no offline win rate and are left out, e.g. {tmp_path / '1'}" in capsys.readouterr().err
    assert cli.carry_out(cli.Leaderboard((tmp_path / "1",))) == 2


def test_settings_tell_runs_of_one_agent_apart():
    runs = [result("sea", 0, FAST), result("sea", 0, SLOW, overrides={"candidates": 4})]
    (found,) = leaderboard.tables(runs)
    assert {row.label for row in found.rows} == {"sea (defaults)", "sea (candidates=4)"}
    assert found.target is None


def test_results_are_found_and_everything_is_written(tmp_path):
    for number, told in enumerate([result("online_dpo", 0, SLOW), result("sea", 0, FAST)]):
        folder = tmp_path / "runs" / str(number)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(told))
    pending = tmp_path / "runs" / "pending"
    pending.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (pending / name).write_text("{}")
    results, unfinished = find_results([tmp_path / "runs"])
    assert (len(results), unfinished) == (2, [pending])
    made = leaderboard.tables(results)
    written = [*table.write(made, tmp_path / "out"), *plots.write(made, tmp_path / "out")]
    names = {path.name for path in written}
    assert names == {
        *("leaderboard.md", "leaderboard.csv", "leaderboard.json", "curves.csv"),
        *("win_rate.png", "win_rate_iqm.png", "utility.png", "regret.png"),
    }
    for path in written:
        assert path.stat().st_size > 100
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "out" / "leaderboard.csv").open()))
    assert [row["label"] for row in rows] == ["sea", "online_dpo"]
    assert float(rows[0]["ratio"]) == pytest.approx(1 / 3, abs=1e-5)
    content = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert content[0]["rows"][0]["queries_to_target"] == 25.0
    assert content[0]["rows"][0]["iqm"] == pytest.approx(0.92)
    console = Console(width=180, record=True, file=(tmp_path / "screen").open("w"))
    table.show(made[0], console)
    shown = console.export_text()
    assert "0.920 [0.900, 0.940]" in shown
    assert "0.33" in shown


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"length_controlled_win_rate": "high"}, "length_controlled_win_rate: expected a share or null, got 'high'"),
        ({"evaluations": "many"}, "evaluations: expected a count, got 'many'"),
        ({"beliefs": [1]}, "beliefs: expected a mapping of lists"),
        ({"beliefs": {"queries": [], "believed": []}}, "beliefs: queries: expected a list of counts"),
        ({"agent_config": [1]}, "agent_config: expected a mapping"),
        ({"time": [1]}, "time: expected a mapping of seconds"),
        ({"kind": "odd"}, "kind: expected finite or text"),
        ({"curve": [1]}, "curve: expected a mapping of lists"),
        ({"curve": {"offline_win_rate": [0.5]}}, "curve: queries: expected a list of counts, got 'None'"),
        ({"curve": {"queries": [0, 9], "offline_win_rate": [0.5]}}, "curve: offline_win_rate: expected 2 values"),
        ({"curve": {"queries": [0], "offline_win_rate": [1.5]}}, "offline_win_rate: expected numbers from 0 to 1"),
        ({"curve": {"queries": [0], "win_low": [0.5]}}, "expected win_low and win_high to be known at the same"),
        ({"label": None}, "label: expected a text"),
        ({"label": ...}, "got no label"),
    ],
)
def test_a_result_of_another_shape_is_refused_by_its_name(tmp_path, capsys, changes, said):
    told = {name: value for name, value in {**result("sea", 0, FAST), **changes}.items() if value is not ...}
    (tmp_path / "result.json").write_text(json.dumps(told))
    assert cli.carry_out(cli.Leaderboard((tmp_path,), html=tmp_path / "report.html")) == 2
    err = capsys.readouterr().err
    assert said in err
    assert str(tmp_path / "result.json") in err


def test_nothing_found_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"no result\.json"):
        find_results([tmp_path])
    with pytest.raises(ValueError, match="not a folder"):
        find_results([tmp_path / "no"])


def test_a_figure_names_its_bands():
    (one,) = leaderboard.tables([result("online_dpo", 0, SLOW), result("sea", 0, FAST)])
    (many,) = leaderboard.tables([result("sea", s, FAST) for s in range(10)])
    drawn = plots.figure([one, many], "offline_win_rate", "offline win rate")
    texts = [[text.get_text() for text in panel.texts] for panel in drawn.axes]
    assert "mean; band: 95% bootstrap over held-out prompts (1 seed)" in texts[0]
    assert "mean; band: 95% bootstrap over 10 seeds" in texts[1]
    assert {"sea", "online_dpo"} <= set(texts[0])
    colours = {line.get_color() for line in drawn.axes[0].lines}
    assert {"#0072B2", "#D55E00"} <= colours
