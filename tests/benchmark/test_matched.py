"""Win rate at matched KL, from curves that can be read by eye."""

import numpy as np
import pytest
from test_leaderboard import result

from llm_duel_env.benchmark import leaderboard
from llm_duel_env.benchmark.matched import matched, read_off, value_at
from llm_duel_env.benchmark.report import details, records, table


def run(agent, seed, kl, wins, **changes):
    told = result(agent, seed, wins, **changes)
    told["curve"]["kl"] = kl
    return told


def board(seeds=10):
    runs = []
    for seed in range(seeds):
        runs.append(run("online_dpo", seed, [0, 1, 2, 3, 4], [0.5, 0.6, 0.7, 0.8, 0.9 + 0.001 * seed]))
        runs.append(run("sea", seed, [0, 0.5, 1, 1.5, 2], [0.5, 0.6, 0.7, 0.8, 0.9]))
        # One seed of this one falls short of 1 nat.
        runs.append(run("xpo", seed, [0, 0.2, 0.4, 0.6, 0.8 if seed == 0 else 1.2], [0.5, 0.55, 0.6, 0.65, 0.7]))
    return leaderboard.tables(runs)[0]


@pytest.mark.parametrize(
    ("level", "expected"),
    [(0.0, 0.5), (0.5, 0.55), (1.0, 0.6), (2.0, 0.7), (2.5, None)],  # the first time counts, not the last
)
def test_the_first_crossing_is_read_off_between_evaluations(level, expected):
    kl, wins = np.array([0.0, 1.0, 2.0, 0.5, 2.0]), np.array([0.5, 0.6, 0.7, 0.9, 0.9])
    assert value_at(level, kl, wins) == (None if expected is None else pytest.approx(expected))


def test_a_run_that_starts_beyond_a_level_is_read_at_its_start():
    assert value_at(0.5, np.array([1.0, 2.0]), np.array([0.6, 0.7])) == 0.6
    with pytest.raises(ValueError, match="one value per KL"):
        value_at(0.5, np.zeros(2), np.zeros(3))


def test_every_seed_must_reach_a_level():
    by_seed = {0: run("a", 0, [0, 1, 2, 3, 4], [0.5] * 5), 1: run("a", 1, [0, 0, 0, 0, 1], [0.5] * 5)}
    assert set(read_off(by_seed, (1.0, 3.0))) == {1.0}
    del by_seed[1]["curve"]["kl"]
    assert read_off(by_seed, (1.0,)) == {}


def test_agents_are_compared_where_both_get():
    found = matched(board())
    assert found.levels == (0.25, 0.5, 1.0, 1.5, 2.0)  # only online DPO gets further
    sea, dpo, xpo = (found.agents[name] for name in ("sea", "online_dpo", "xpo"))
    assert sea[1.0].win_rate == pytest.approx(0.7)
    assert sea[1.0].interval == pytest.approx((0.7, 0.7))
    assert dpo[1.0].win_rate == pytest.approx(0.6)
    assert dpo[1.0].difference is None
    assert sea[1.0].difference.estimate == pytest.approx(0.1)
    assert (sea[2.0].difference.low, sea[2.0].difference.high) == pytest.approx((0.2, 0.2))
    assert 1.0 not in xpo  # one of its seeds never gets there
    assert xpo[0.5].win_rate == pytest.approx(0.625)


def test_too_few_seeds_give_no_interval_and_no_difference():
    at = matched(board(seeds=3)).agents["sea"][1.0]
    assert (at.win_rate, at.interval, at.difference) == (pytest.approx(0.7), None, None)


def test_the_tables_and_records_say_so():
    one = board()
    shown = {block.title: block for block in details.blocks(one)}
    headings, rows = shown["Win rate at matched KL"].headings, shown["Win rate at matched KL"].rows
    cells = {row[0]: dict(zip(headings, row)) for row in rows}
    assert cells["sea"]["KL 1"] == "0.700 [0.700, 0.700]"
    assert cells["xpo"]["KL 1"] == "–"
    less = {row[0]: row for row in shown["Less online_dpo at matched KL"].rows}
    assert "online_dpo" not in less
    assert less["sea"][headings.index("KL 1")] == "+0.100 [+0.100, +0.100]"
    assert "Win rate at matched KL:" in table.markdown([one])
    told = {record["label"]: record for record in records.records([one])}
    assert told["sea"]["win_rate_at_kl_1"] == pytest.approx(0.7)
    assert told["xpo"]["win_rate_at_kl_1"] is None
    assert told["sea"]["difference_at_kl_2"] == pytest.approx(0.2)
