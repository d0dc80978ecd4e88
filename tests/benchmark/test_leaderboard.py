"""The leaderboard from results made by hand: every figure can be checked on paper."""

import csv
import io
import json

import numpy as np
import pytest
from rich.console import Console

from llm_duel_env import cli
from llm_duel_env.benchmark import leaderboard
from llm_duel_env.benchmark.report import plots, table
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


def test_one_seed_gets_the_interval_over_prompts_and_says_so():
    (found,) = leaderboard.tables([result("online_dpo", 0, SLOW), result("sea", 0, FAST)])
    assert found.rows[0].win_interval == pytest.approx((0.90, 0.94))
    assert any("over held-out prompts, not over seeds" in note for note in table.notes(found))
    assert any("no ranks" in note for note in table.notes(found))
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
        *("win_rate.png", "utility.png", "regret.png"),
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
