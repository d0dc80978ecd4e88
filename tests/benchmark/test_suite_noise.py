"""What the suite noise shows, on results made here."""

from llm_duel_env.benchmark import noise_study
from llm_duel_env.benchmark.suite import planned

WINS = {"sea": 0.9, "online_dpo": 0.8, "xpo": 0.7, "uniform": 0.5}
LOST = {"no flips": 0.0, "10% flipped": 0.1, "threshold": -0.05}


class Stored:
    """Ten seeds of four agents in three of the suite's worlds, seven of XPO in one of them; SEA alone suffers from
    flips, to below online DPO."""

    def result(self, run):
        name = noise_study.name_of((run.env, run.env_kwargs))
        if run.label not in WINS or name not in LOST or ((run.label, name) == ("xpo", "threshold") and run.seed > 6):
            return None
        end = WINS[run.label] - (1.5 * LOST[name] if run.label == "sea" else 0.0) + run.seed / 500
        return {
            "label": run.label, "seed": run.seed, "budget": 1000, "queries": 1000, "kind": "finite",
            "curve": {"queries": [0, 1000], "offline_win_rate": [0.5, end]},
        }  # fmt: skip


def rows_of(lines, title):
    """The table below a heading: its cells by the first of each row."""
    begun = lines.index(title)
    table = [line for line in lines[begun + 2 :] if line]
    table = table[: next((i for i, line in enumerate(table) if not line.startswith("|")), len(table))]
    return {cells[0]: cells[1:] for line in table if (cells := [c.strip() for c in line.strip("|").split("|")])}


def test_the_three_tables_are_those_of_the_results():
    lines = noise_study.report(planned("noise", "runs"), Stored())
    wins = rows_of(lines, "## Final offline win rate")
    assert wins["agent"] == ["no flips", "10% flipped", "threshold"]  # nothing is kept of the other worlds
    assert list(wins)[2:] == ["sea", "online_dpo", "xpo", "uniform", "the same order"]
    assert wins["sea"] == ["0.909", "0.759", "0.984"]
    assert wins["the same order"] == ["1.000", "0.500", "1.000"]  # without uniform: two of three change places
    assert wins["xpo"] == ["0.709", "0.709", "0.706 (7 of 10)"]
    less = rows_of(lines, "## Less online DPO in the same world")
    assert less["sea"][1] == "-0.050 [-0.050, -0.050]"
    assert less["online_dpo"] == ["–", "–", "–"]
    own = rows_of(lines, "## Less the agent's own under: no flips")
    assert own["sea"] == ["–", "-0.150 [-0.150, -0.150]", "+0.075 [+0.075, +0.075]"]
    assert own["xpo"][1] == "+0.000 [+0.000, +0.000]"
    assert lines[-1].startswith("Means over 10 seeds")


def test_nothing_kept_is_said():
    class Empty:
        def result(self, run):
            return None

    assert noise_study.report(planned("noise", "runs"), Empty()) == ["nothing is kept of the suite noise"]


def test_every_world_of_the_suite_has_a_name_of_its_own():
    worlds = {str(run.env_kwargs): noise_study.name_of((run.env, run.env_kwargs)) for run in planned("noise", "runs")}
    expected = {"no flips", "10% flipped", "20% flipped", "30% flipped", "threshold", "intransitive"}
    assert set(worlds.values()) == expected
    assert len(worlds) == len(expected)
    odd = ("duel/Synthetic-v0", {"flip_rate": 0.1, "feedback": "threshold"})
    assert noise_study.name_of(odd) == 'duel/Synthetic-v0 {"feedback": "threshold", "flip_rate": 0.1}'
