"""What the suite paper-real shows, on results made here."""

import pytest

from llm_duel_env.benchmark import pairs_study
from llm_duel_env.benchmark.suite import planned

WINS = {
    "real": 0.8,
    "real-random": 0.7,
    "real-similar": 0.6,
    "real-centroid": 0.75,
    "online_dpo": 0.9,
    "real-350": 0.72,
}


class Stored:
    """Results of the ten seeds of every run of Synthetic at correlation 0.6, and none of others."""

    def result(self, run):
        if pairs_study.correlation(run.env_kwargs) != 0.6 or run.label not in WINS:
            return None
        end = WINS[run.label] + run.seed / 1000
        wins = [0.5, (0.5 + end) / 2, end, end]
        flipped = 100 if run.label == "real-similar" else 20
        return {
            "label": run.label, "seed": run.seed, "budget": run.budget, "batch": run.batch,
            "queries": run.budget, "kind": "finite",
            "labels": {"even": 5, "tied": 0, "flipped": flipped, "identical": 1},
            "curve": {"queries": [0, run.budget // 4, run.budget // 2, run.budget], "offline_win_rate": wins},
        }  # fmt: skip


@pytest.fixture(scope="module")
def runs():
    return planned("paper-real", "runs")


def test_shares_and_differences_are_those_of_the_results(runs):
    lines = pairs_study.report(runs, Stored())
    rows = {cells[0]: cells[1:] for line in lines if (cells := [c.strip() for c in line.strip("|").split("|")])}
    assert sum(line.startswith("## duel/") for line in lines) == 1  # nothing is kept of the others
    assert rows["real-similar"][:2] == ["0.5%", "10.0%"]
    assert rows["real"][:2] == ["0.5%", "2.0%"]
    assert rows["real"][2:4] == ["0.804", "+0.100 [+0.100, +0.100]"]
    assert rows["real-random"][3] == "–"
    assert rows["real"][4] == "10"
    # 350 dissimilar pairs end at 0.72, all random ones at 0.7, which dissimilar ones pass between 250 (0.65) and 500
    # labels (0.8): at the mark after 0.34.
    assert rows["0.6"] == ["+0.020 [+0.020, +0.020]", "0.35"]
    assert "real-350" not in rows  # another budget, which stands in the second table alone


def test_what_is_not_known_is_no_number(runs):
    class Old(Stored):
        def result(self, run):
            found = super().result(run)
            return None if found is None or run.seed > 2 else {**found, "labels": None}

    lines = pairs_study.report(runs, Old())
    (real,) = [line for line in lines if line.startswith("| real |")]
    assert [cell.strip() for cell in real.strip("|").split("|")] == ["real", "–", "–", "0.801", "–", "3"]
    never = {0: {"budget": 100, "batch": 32, "curve": {"queries": [0, 50, 100], "offline_win_rate": [0.5, 0.6, 0.6]}}}
    better = {0: {"budget": 100, "batch": 32, "curve": {"queries": [0, 50, 100], "offline_win_rate": [0.5, 0.6, 0.7]}}}
    assert pairs_study.share_needed(never, better) is None
